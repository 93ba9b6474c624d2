from pathlib import Path

from setuptools import setup

setup(
    name="lavish_fast",
    version="0.1.0",
    description="LAVISH, fast and tested: a frozen vision transformer that reads video and sound",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=[
        "lavish_fast",
        "lavish_fast.backbones",
        "lavish_fast.commands",
        "lavish_fast.demos",
        "lavish_fast.kernels",
        "lavish_fast.synthetic",
        "lavish_fast.tasks",
    ],
    package_dir={"lavish_fast.kernels": "kernels"},
    package_data={"lavish_fast": ["data/*"]},
    install_requires=[
        "torch>=2.11,<2.12",
        "torchaudio>=2.11,<2.12",
        "timm>=1.0.20",
        "xformers==0.0.35; sys_platform == 'linux'",
        "safetensors",
        "huggingface_hub",
        "av",
        "h5py",
        "numpy",
        "typer>=0.19",
        "rich",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "test": ["pytest", "hypothesis", "ruff"],
        "benchmarks": ["pytest-benchmark", "nvidia-ml-py", "torchvision"],
    },
    entry_points={"console_scripts": ["lavish-fast = lavish_fast.cli:main"]},
)

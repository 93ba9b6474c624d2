"""A candidate's kernels by name and time, from what the profiler of a card says."""

import pytest
import torch

from benchmarks import profile
from benchmarks.profile import Kernel, row, short, table, total

_COPY = (
    "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}"
)
_SUM = "at::native::sum_functor<float, float, float>::operator()(at::TensorIterator&)::{lambda(float, float)#1}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_adapter_fwd", "_adapter_fwd"),
        ("triton_poi_fused_gelu_view_0", "triton_poi_fused_gelu_view_0"),
        ("nvjet_sm90_tst_64x8_64x16_2x4_h_bz_splitK_bias_TNT", "nvjet_sm90_tst_64x8_64x16_2x4_h_bz_splitK_bias_TNT"),
        ("Memset (Device)", "Memset"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        (
            f"void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<{_COPY}>"
            f"(at::TensorIteratorBase&, {_COPY} const&)::{{lambda(int)#1}}>(int, ...)",
            "elementwise_kernel<direct_copy_kernel_cuda>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel<CUDAFunctor_add>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, "
            "at::native::binary_internal::MulFunctor<float> >, std::array<char*, 3ul> >(int)",
            "vectorized_elementwise_kernel<MulFunctor>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, "
            "at::native::GeluType)::{lambda()#2}::operator()() const::{lambda(float)#1}, std::array<char*, 2ul> >(int)",
            "vectorized_elementwise_kernel<GeluCUDAKernelImpl>",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, "
            f"{_SUM}>, unsigned int, float, 4, 4> >(at::native::ReduceOp<float>)",
            "reduce_kernel<sum_functor>",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float> > >()",
            "reduce_kernel<MeanOps>",
        ),
        (
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::(anonymous namespace)::"
            "OpaqueType<2u>, unsigned int, 4, 64, 64>(at::native::(anonymous namespace)::OpaqueType<2u>*)",
            "CatArrayBatchedCopy_contig",
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
            "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float> >()",
            "multi_tensor_apply_kernel<FusedAdamMathFunctor>",
        ),
        (
            "void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, c10::BFloat16, float, 5, false>(float*)",
            "softmax_warp_forward",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_simt_sgemm_64x64_8x5_tn_align1>(cutlass::Params)",
            "cutlass::Kernel2<cutlass_80_simt_sgemm_64x64_8x5_tn_align1>",
        ),
        (
            "void cudnn::engines_precompiled::nchwToNhwcKernel<float>(int)",
            "cudnn::engines_precompiled::nchwToNhwcKernel",
        ),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 57 + "..."),
    ],
)
def test_short_names_tell_kernels_apart(name, expected):
    assert short(name) == expected


def test_total_adds_up_calls_of_one_name_and_has_the_longest_first():
    ran = [("b", 1.0), ("void a<float>(int)", 4.0), ("b", 2.0), ("void a<float>(int)", 6.0), ("b", 3.0), ("b", 6.0)]
    assert total(ran, 2) == [Kernel("b", 2.0, 6.0), Kernel("a", 1.0, 5.0)]
    assert total([("c", 3.0)], 2) == [Kernel("c", 0.5, 1.5)]
    assert total([], 3) == []


def test_the_table_has_the_longest_the_rest_and_all():
    kernels = [Kernel("a", 2, 6000.0), Kernel("b", 0.5, 3000.0), Kernel("c", 1, 600.0), Kernel("d", 3, 400.0)]
    made = table(kernels, "a title", most=2)
    assert made.title == "a title"
    cells = list(zip(*(column.cells for column in made.columns)))
    assert cells == [
        ("a", "2", "6.000", "60.0%"),
        ("b", "0.5", "3.000", "30.0%"),
        ("2 more", "4", "1.000", "10.0%"),
        ("all", "6.5", "10.000", ""),
    ]
    assert len(list(table(kernels, "", most=4).columns[0].cells)) == 5
    assert list(table([], "").columns[0].cells) == ["all"]


def test_a_row_is_plain_data():
    assert row([Kernel("a", 1.5, 2.3456)]) == [{"name": "a", "calls": 1.5, "us": 2.35}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_of_a_call():
    x = torch.ones(2**20, device="cuda")
    found = {kernel.name: kernel for kernel in profile.kernels(lambda: (x + x, x.exp(), x + x))}
    (add,) = (kernel for name, kernel in found.items() if "add" in name)
    (exp,) = (kernel for name, kernel in found.items() if "exp" in name)
    assert (add.calls, exp.calls) == (2, 1)
    assert add.us > 0

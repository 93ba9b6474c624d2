#!/usr/bin/env bash
# Everything that a machine with a CUDA card has to tell, in one command and at most nine minutes: parity on the card,
# the kernels, inference, the ladders, training, memory, the limits, the peers. What does not fit is listed as skipped;
# results are written as they come, so that a cut loses nothing.
#
#   benchmarks/gpu.sh [--out FOLDER] [--budget SECONDS] [--dry]
#
# More than the 540 s of --budget gives every step as much more. --dry runs the same on a CPU at tiny sizes. PYTHON names the interpreter (default python3); no network is needed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out="" budget=540 dry=""
while (($#)); do
    case $1 in
    --out) out=$2 && shift 2 ;;
    --budget) budget=$2 && shift 2 ;;
    --dry) dry=1 && shift ;;
    *) echo "gpu.sh: expected --out FOLDER, --budget SECONDS or --dry, got $1" >&2 && exit 2 ;;
    esac
done

missing="" parallel=""
lacks() { # MODULE WHAT: says what goes without it
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is not None)" && {
        echo "missing: $1 ($2)"
        missing+=" $1"
    }
}
for module in torch triton timm safetensors typer rich; do lacks $module "nothing runs without it"; done
if [[ $missing ]]; then
    echo "gpu.sh: expected$missing, which 'pip install -e .[test,benchmarks]' brings" >&2
    exit 2
fi
lacks xformers "no xformers attention"
lacks torchvision "no XDC, AVTS and GDT"
lacks pynvml "no clocks, power and driver in the rows"
lacks pytest "no parity tests on the card"
lacks xdist "the tests run one after another" || parallel="-n 12 --dist worksteal"
lacks av "no tests of video files"
lacks matplotlib "no picture of the ladder"
"$python" -c "import lavish_fast.kernels" 2>/dev/null ||
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e . || exit 2

if [[ $dry ]]; then
    common="--device cpu --preset small" batches=1,2 seconds=0.05 execution=eager batch=1
else
    common="--device cuda --preset paper" batches=2,8,32 seconds=0.3 execution=blocks batch=8
    "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
        echo "gpu.sh: expected a CUDA card, got none (--dry runs on a CPU)" >&2
        exit 2
    }
fi
device=${common#--device } device=${device%% *} preset=${common##* }
out=${out:-$("$python" -c "from benchmarks import results; print(results.folder('$device'))")}
mkdir -p "$out"
steps=$out/steps.txt
began=$SECONDS failed=""
say() { echo "$*" | tee -a "$steps"; }
say "gpu.sh ${dry:+--dry }$(date -u +%FT%TZ) commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $budget s${missing:+, missing$missing}"

step() { # NAME LIMIT COMMAND...: within its limit and what is left of the budget
    local name=$1 limit=$2 left=$((budget - SECONDS + began)) start=$SECONDS code
    shift 2
    if ((left < 15)); then
        say "skipped   $name: $left s are left"
        return
    fi
    ((budget > 540)) && ((limit = limit * budget / 540))
    ((limit = limit < left ? limit : left))
    echo "== $name, at most $limit s"
    # A step stops by itself before it is stopped.
    timeout --kill-after=5 "$limit" env BUDGET=$((limit * 7 / 10)) "$@"
    code=$?
    case $code in
    0) say "done      $name: $((SECONDS - start)) s" ;;
    124 | 137) say "cut off   $name: after $((SECONDS - start)) s" ;;
    *) say "exit $code    $name: $((SECONDS - start)) s" && failed+=" $name" ;;
    esac
}
run() { # NAME LIMIT ARGUMENTS...: the step's budget reaches the runner through the environment
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" bash -c '"$0" -m benchmarks run --budget "$BUDGET" "$@"' "$python" $common \
        --seconds "$seconds" --out "$out/bench.jsonl" "$@"
}

if [[ " $missing " != *" pytest "* ]]; then
    # On a card the kernels' tests run on it, in every type; elsewhere in the interpreter, which the dry run leaves out.
    [[ $dry ]] || step "the kernels' tests" 85 "$python" -m pytest -p no:cacheprovider $parallel -k "not buil" \
        tests/test_kernel_*.py
    step "parity tests on the card" 45 "$python" -m pytest -m gpu -p no:cacheprovider \
        --continue-on-collection-errors --deselect tests/test_kernel tests
fi
for dtype in bfloat16 float32; do
    step "roofline, $dtype" 8 "$python" -m benchmarks roofline --measure --device "$device" --dtype $dtype \
        --out "$out/limits.jsonl"
done
run "kernels" 40 --case gather_latents,adapter,window_attention --batch "${batches##*,}" --execution eager --dtype bfloat16
# Stage 3 has most of the blocks.
[[ $dry ]] || step "tuning" 30 bash -c 'set -o pipefail; "$@" --budget "$BUDGET" | tee "$0"' "$out/tuned.txt" \
    "$python" -m benchmarks tune --stage 3 --seconds 0.02
run "inference" 45 --case ave,backbone --mode inference --batch "$batches"
# Compiling takes most of it.
[[ $dry ]] || run "training steps" 95 --case ave --mode training --batch 2,16 --path optimized --execution step \
    --dtype bfloat16
for mode in inference training; do
    name=ladder
    [[ $mode == training ]] && name=ladder-training
    step "$name" 48 bash -c '"$@" --budget "$BUDGET"' - "$python" -m benchmarks ladder $common --mode $mode --batch $batch \
        --execution $execution --seconds "$seconds" --timeout 50 --out "$out/$name.jsonl"
done
run "training" 45 --case ave --mode training --batch "$batches" --path released,concatenated,fused --execution eager \
    --dtype bfloat16,bfloat16-autocast
step "memory" 10 "$python" -m benchmarks memory --rows "$out" --preset "$preset"
[[ $dry ]] || step "profile" 25 "$python" -m benchmarks profile --batch $batch --out "$out/profile.jsonl"
# In what the others left.
run "peers" 60 --case cmbs,mbt,ave-vit,xdc,avts,gdt --batch "${batches%%,*}"

echo
cat "$steps"
[[ -z $failed ]]

#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without network: builds, tests, measures, and leaves a report of at most eight
# files in $OUT (default build/gpu_check). A stage that fails or runs out of time takes nothing from those before it.
#
#   scripts/gpu_check.sh [STAGE | SHAPE,B,T] …       default: machine build ops model program
#
#   machine    what is there                         sanitize   memcheck, racecheck, initcheck, synccheck: tests and model
#   build      programs and tests, BF16 and FP32     sanitize_lab   the same of the files of dev/cuda, their small shapes
#   ops        each op against the CPU               learn      the default run; 15M on Shakespeare in both precisions
#   model      the model against llama3.c, PyTorch   time       tokens per second beside PyTorch's, of SHAPE,B,T … or all
#   program    resume, CPU and GPU, mistakes         profile    a step's kernels, and what ncu says of ours
#   cli        black-box tests; CLI_TESTS=PATTERN    lab        dev/cuda: selftest, check, report beside the peers
#
# Beside the tree it needs a folder, .gpu or $GPU_KIT: deps (a prefix with PCRE2, cJSON, cmocka, cudnn-frontend), data (the
# test data), bench/peer_torch.py.
set -u
cd "$(dirname "$0")/.."
root=$PWD
kit=$(realpath "${GPU_KIT:-.gpu}")
out=${OUT:-$root/build/gpu_check}
deps=${DEPS:-$kit/deps}
export LLAMA3_DATA=${LLAMA3_DATA:-$kit/data}
jobs=$(nproc)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
summary=$out/summary.txt
start=$SECONDS

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# check LOG LIMIT NAME COMMAND …: runs it for at most LIMIT seconds, its output behind LOG's, and notes how it ended
check() {
    local log=$out/$1 limit=$2 name=$3 begin=$SECONDS code
    shift 3
    printf '\n==== %s: %s\n' "$name" "$(tr '\n' ' ' <<<"$*")" >>"$log"
    [ "$(type -t "$1")" != function ] || set -- bash -c '"$@"' "$1" "$@" # timeout runs programs alone
    timeout -k 10 "$limit" "$@" >>"$log" 2>&1
    code=$?
    case $code in
        0) say "$(printf 'ok    %4d s  %s' $((SECONDS - begin)) "$name")" ;;
        124 | 137) say "$(printf 'TIME  %4d s  %s' $((SECONDS - begin)) "$name")" ;;
        *) say "$(printf 'FAIL  %4d s  %s (exit %d)' $((SECONDS - begin)) "$name" $code)" ;;
    esac
    return $code
}

# what the last command of a log printed, the lines that match
last() { tac "$out/$1" | sed '/^==== /Q' | tac | grep -a -E "$2"; }
show() { last "$1" "$2" | head -n "${3:-20}" | cut -c1-160 | sed 's/^/      /' | tee -a "$summary"; }

# cuDNN and, where the toolkit lacks them, cuBLASLt and NVRTC, from Python's packages, under names a linker finds
make_extra() {
    local extra=$root/build/cuda-extra toolkit site name file
    toolkit=$(echo | nvcc -dryrun -x cu -E - 2>&1 | sed -n 's/^#\$ TOP=//p')
    site=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null)
    mkdir -p "$extra/include" "$extra/lib"
    [ -n "$site" ] || return 0
    local packages="cudnn"
    [ -e "$toolkit/include/cublasLt.h" ] || packages="$packages cublas cu13"
    [ -e "$toolkit/include/nvrtc.h" ] || packages="$packages cuda_nvrtc"
    for name in $packages; do
        for file in "$site/$name"/include/*.h; do
            # of a folder that holds the whole toolkit, only what is missing: two versions of one header do not mix
            case $name in cu13) case ${file##*/} in cublas* | nvrtc*) ;; *) continue ;; esac ;; esac
            [ -e "$file" ] && ln -sf "$file" "$extra/include/"
        done
        for file in "$site/$name"/lib/*.so.*; do
            case $name in cu13) case ${file##*/} in libcublas* | libnvrtc*) ;; *) continue ;; esac ;; esac
            [ -e "$file" ] || continue
            ln -sf "$file" "$extra/lib/"
            ln -sf "$file" "$extra/lib/$(basename "$file" | sed 's/\.so\..*/.so/')"
        done
    done
}

make_gpu() { make -k -j"$jobs" DEPS="$deps" CUDA_EXTRA="$root/build/cuda-extra" "$@"; }
folder() { # of the objects of a precision
    local found
    found=$(ls -dt "$root"/build/release/sm*-"$1"* 2>/dev/null | head -n 1)
    echo "${found:-/nothing-built}"
}

stage_machine() {
    check build.log 60 "machine" bash -c '
        nvidia-smi; nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap,clocks.max.sm,power.limit --format=csv
        nvcc --version; gcc --version | head -n 1; uname -r; lscpu | grep "Model name"; nproc; free -g | head -n 2
        ls /usr/local/cuda/include | grep -E "^(cublasLt|nvrtc|cudnn)\.h|nvtx3"; ls /usr/local/cuda/lib64 | grep -E "cublasLt|nvrtc"
        command -v ncu compute-sanitizer nsys
        python3 -c "import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())"
        python3 -c "import nvidia; print(list(nvidia.__path__))"; find / -name "cudnn.h" -not -path "/proc/*" 2>/dev/null; true'
    show build.log 'NVIDIA H|release|Model name|^2\.'
}

stage_build() {
    make_extra
    check build.log 120 "build: CPU program and library" make -j"$jobs" DEPS="$deps" llama3 build/release/llama3_library.o
    check build.log 420 "build: BF16" make_gpu_all BF16 &
    check build32.log 420 "build: FP32" make_gpu_all FP32 &
    wait
    cat "$out/build32.log" >>"$out/build.log" && rm "$out/build32.log"
    grep -E '(^|[ :])(fatal )?error( |:)|undefined reference|: \*\*\*' "$out/build.log" | grep -v '^nvcc\|^gcc' | sort -u | head -n 20 | cut -c1-200 | tee -a "$summary"
}

# a file that does not compile does not keep the others from running
make_gpu_all() {
    local code=0 built
    make_gpu PRECISION="$1" train_llama3cu test_ops test_llama3cu || code=1
    if [ $code -ne 0 ]; then
        built=$(ls "$(folder "$1")"/test_*.o 2>/dev/null | sed 's/.*test_\(.*\)\.o/\1/' | grep -v '^llama3$')
        make_gpu PRECISION="$1" OPS="$(echo $built)" test_ops
        make_gpu PRECISION="$1" OPS="$(echo $built)" test_llama3cu
    fi
    return $code
}

model_tests="golden gradients prefix lengths no_labels accumulation runs moments master timing memory learning generation"

stage_ops() {
    for precision in BF16 FP32; do
        check tests.log 240 "ops, $precision" "$(folder $precision)/test_ops"
        show tests.log '^(ok|FAIL|error)'
    done
}

stage_model() {
    for precision in FP32 BF16; do
        check tests.log 240 "model, $precision" "$(folder $precision)/test_llama3cu" $model_tests
        show tests.log '^(ok|FAIL|error)'
    done
}

# what racecheck must leave out of a program, since it misjudges it (dev/test/gpu/racecheck_limits.cu shows how)
beyond_racecheck() {
    case $1 in
        attention | attention_forward) echo hopper ;;                              # the copy engine writes, mbarriers give the order
        attention_backward) echo hopper flash_backward_kv ;;                       # and bar.arrive: see arrive_as_sync
        rmsnorm_forward | residual_rmsnorm_forward) echo bulk cooperative ;;       # and cooperative_groups::reduce
        rmsnorm_backward | residual_rmsnorm_backward) echo producer ring_kernel ;; # and barriers of part of a block, unevenly often
    esac
}

# races COMMAND …: racecheck finds nothing but reads of what the copy engine wrote. Of kernels in clusters none may be left out,
# cuBLAS's included, since racecheck dies of those; their hazards with the copy engine are passed over here
races() {
    local log=$work/races.$BASHPID code
    compute-sanitizer --tool racecheck --print-limit 1000 "$@" >"$log" 2>&1
    code=$?
    cat "$log"
    awk '/Race reported/ { engine = /bulk_load|tma_load/; next }
         /and (Read|Write|Atomic) access/ && !engine && !/bulk_load|tma_load/ { left++ }
         END { print "races left: " left + 0; exit left > 0 }' "$log" && [ $code -eq 0 ]
}

# sanitized TOOL NAME COMMAND …: of our kernels alone, whose names end in _kernel; those of the libraries have other flaws, and
# some do not survive it
sanitized() {
    local tool=$1 name=$2 log="sanitize-$1-$2.log" kernel check_with="compute-sanitizer --tool $1 --error-exitcode 9"
    local kernels="--kernel-name kns=_kernel"
    shift 2
    for kernel in bench_ cublas cudnn cutlass; do kernels="$kernels --kernel-name-exclude kns=$kernel"; done
    if [ "$tool" = racecheck ]; then
        check_with=races
        for kernel in $(beyond_racecheck "$name"); do kernels="$kernels --kernel-name-exclude kns=$kernel"; done
        case $name in matmul | lm_head_loss) kernels="" ;; esac # cuBLAS's are in clusters
    fi
    check "$log" "${SANITIZE_SECONDS:-300}" "$tool: $name" $check_with $kernels "$@"
    show "$log" 'SUMMARY|races left|^========= (Invalid|Uninit|Program|Internal|.*_kernel)|^error|^FAIL' 6
    cat "$out/$log" >>"$out/sanitize.log" && rm "$out/$log"
}

# what the sanitizer must find, with the same options
planted() {
    cat >"$work/planted.cu" <<'CUDA'
static __global__ void planted_kernel(float* x) {
    __shared__ float s[64];
    s[threadIdx.x ^ 32] = x[threadIdx.x];
    x[threadIdx.x + 32] = s[threadIdx.x];
}
int main(void) {
    float* x;
    cudaMalloc(&x, 64 * sizeof *x);
    planted_kernel<<<1, 64, 0, 0>>>(x);
    return cudaDeviceSynchronize() != cudaSuccess;
}
CUDA
    nvcc -arch=native -lineinfo -o "$work/planted" "$work/planted.cu" || return 1
    for tool in memcheck initcheck; do
        compute-sanitizer --tool $tool --kernel-name kns=_kernel --print-limit 1 --error-exitcode 9 "$work/planted"
        [ $? -eq 9 ] || { echo "$tool misses it"; return 1; }
    done
    races --kernel-name kns=_kernel "$work/planted" | grep "races left: [1-9]" || { echo "racecheck misses it"; return 1; }
}

# each of its programs is right, and racecheck reports it or dies of it: when one passes, what is left out can come back
misjudged() {
    nvcc -std=c++17 -arch=native -lineinfo -o "$work/limits" dev/test/gpu/racecheck_limits.cu || return 1
    local limit says
    for limit in uneven groups cluster; do
        [ $limit = cluster ] && says="Internal Sanitizer Error" || says="races left: [1-9]"
        "$work/limits" $limit || return 1
        races --kernel-name kns=_kernel "$work/limits" $limit | grep "$says" || { echo "racecheck understands $limit now"; return 1; }
    done
}

# racecheck does not know that a warp which goes on behind bar.arrive still meets the others at the next barrier of the block.
# With bar.sync in its place, which orders nothing that racecheck complains of, it sees that it does
arrive_as_sync() {
    sed -i.before 's/bar\.arrive/bar.sync/' llmc/attention_flash.cuh
    make_gpu PRECISION=BF16 USE_CUDNN=0 OPS=attention test_ops
    local code=$?
    mv llmc/attention_flash.cuh.before llmc/attention_flash.cuh
    return $code
}

stage_sanitize() {
    local bf16 op running=0
    local -x OMP_NUM_THREADS=$(((jobs + 11) / 12)) # or the threads of twelve programs wait for each other
    bf16=$(folder BF16)
    check sanitize.log 60 "the sanitizer finds what was planted" planted
    check sanitize.log 60 "racecheck misjudges what it did" misjudged
    check sanitize.log 200 "build: attention with bar.sync for bar.arrive" arrive_as_sync
    for op in $(ls "$bf16"/test_*.o | sed 's/.*test_\(.*\)\.o/\1/' | grep -v '^llama3$'); do
        sanitized memcheck "$op" "$bf16/test_ops" --reduced "$op" &
        sanitized initcheck "$op" "$bf16/test_ops" --reduced "$op" &
        sanitized synccheck "$op" "$bf16/test_ops" --reduced "$op" &
        case $op in
            matmul | lm_head | attention_cudnn) ;; # no kernels of ours, or those of cross_entropy
            attention) sanitized racecheck "$op" build/release/sm*-BF16/test_ops --reduced --ours "$op" & ;;
            *) sanitized racecheck "$op" "$bf16/test_ops" --reduced "$op" & ;;
        esac
        [ $((running = (running + 1) % 3)) -ne 0 ] || wait
    done
    wait
    sanitized memcheck model "$bf16/test_llama3cu" --reduced golden gradients generation &
    for tool in memcheck initcheck synccheck; do
        sanitized $tool training "$bf16/train_llama3cu" train --model tiny --steps 2 --batch 2 --seq 100 --eval-every 2 --sample-every 2 \
            --data "$LLAMA3_DATA/tinyshakespeare.txt" --out "$work/$tool" &
    done
    wait
}

# the lab's programs, whose small shapes are checked in full meanwhile: eight at a time
stage_sanitize_lab() {
    local program name tool
    local -x OMP_NUM_THREADS=$(((jobs + 7) / 8)) # or the threads of eight programs wait for each other
    for program in build/lab/cuda/*-BF16; do
        name=$(basename "$program" -BF16)
        case " ${LAB_FILES:-$name} " in *" ${name%%_*} "* | *" $name "*) ;; *) continue ;; esac
        case $name in selftest | device_info) continue ;; esac # faults on purpose; no table
        for tool in memcheck initcheck synccheck racecheck; do
            while [ "$(jobs -rp | wc -l)" -ge 8 ]; do wait -n; done
            sanitized $tool "$name" "$program" --small &
        done
    done
    wait
}

# ---- the program from outside ------------------------------------------------------------------

# refused WHAT COMMAND …: ends with 1 and one line on stderr that names WHAT
refused() {
    local what=$1 code
    shift
    "$@" >"$work/refused.out" 2>"$work/refused.err"
    code=$?
    cat "$work/refused.err"
    [ $code -eq 1 ] && grep -q -- "$what" "$work/refused.err" && [ "$(grep -c '^error' "$work/refused.err")" -eq 1 ]
}

# close_logs A B TOLERANCE: the losses of the same steps, relatively
close_logs() {
    python3 - "$@" <<'PYTHON'
import json, sys
logs = [{r["step"]: r["train_loss"] for r in map(json.loads, open(p + "/log.jsonl")) if "train_loss" in r} for p in sys.argv[1:3]]
steps = sorted(logs[0].keys() & logs[1].keys())
worst = max((abs(logs[0][s] / logs[1][s] - 1), s) for s in steps)
print(len(steps), "steps, first", steps[0], "last", steps[-1], "losses", logs[0][steps[-1]], logs[1][steps[-1]], "worst", worst)
sys.exit(not (len(steps) >= 20 and logs[0].keys() == logs[1].keys() and worst[0] <= float(sys.argv[3])))
PYTHON
}

same_step() { # A B STEP: weights and optimizer of that step, bit for bit
    cmp "$1/$3/model.safetensors" "$2/$3/model.safetensors" && cmp "$1/$3/optimizer.safetensors" "$2/$3/optimizer.safetensors"
}

# killed OUT SIGNAL COMMAND …: sends the signal when the second checkpoint is there, and goes on with --resume
killed() {
    local to=$1 signal=$2 pid n=0
    shift 2
    "$@" --out "$to" &
    pid=$!
    until [ "$(ls -d "$to"/step-* 2>/dev/null | wc -l)" -ge 2 ] || ! kill -0 $pid 2>/dev/null || [ $((n += 1)) -gt 900 ]; do sleep 0.05; done
    kill -"$signal" $pid || { echo "the run ended before it could be killed"; return 1; }
    wait $pid
    echo "killed with $signal: exit $?"
    [ ! -d "$to/step-00000800" ] || return 1
    "$1" train --resume --out "$to"
}

# from step 20 of a run of FROM, the rest by TO: the losses are those of the whole run
handed_over() {
    local from=$1 to=$2 run=$3 whole=$4 tolerance=$5
    rm -rf "$run"
    cp -r "$whole" "$run"
    rm -rf "$run"/step-00000040 "$run"/step-00000060
    "$to" train --resume --out "$run" && close_logs "$run" "$whole" "$tolerance"
}

eval_loss() { "$1" eval --model "$2" --data "$work/text" --seq 100 --batch 8 | tee /dev/stderr | sed -n 's/^loss \([0-9.]*\).*/\1/p'; }
same_loss() {
    local a b
    a=$(eval_loss "$1" "$3") b=$(eval_loss "$2" "$3")
    python3 -c "import sys; a, b = $a, $b; print(a, b); sys.exit(abs(a / b - 1) > $4)"
}

same_text() { # greedy ids
    local ids="--temperature 0 --tokens 100 --print-ids --ignore-eos --prompt ROMEO:"
    "$1" generate --model "$3" $ids >"$work/a.ids" && "$2" generate --model "$3" $ids >"$work/b.ids" &&
        head -c 300 "$work/a.ids" && cmp "$work/a.ids" "$work/b.ids"
}

stage_program() {
    local bf16 fp32 cpu=$root/build/release/llama3 text=$LLAMA3_DATA/tinyshakespeare.txt
    bf16=$(folder BF16)/train_llama3cu fp32=$(folder FP32)/train_llama3cu
    local run="train --model tiny --data $text --batch 4 --seq 64 --eval-every 20 --eval-steps 2 --sample-every 0 --seed 3"

    check program.log 30 "refused: F no multiple of 8" refused 'intermediate_size\|F 172\|172' "$bf16" generate --model "$LLAMA3_DATA/stories260K/hf" --ids 1 --print-ids --tokens 2
    check program.log 30 "refused: HD no multiple of 8" refused 'head_dim\|HD' "$bf16" generate --model dev/test/golden/group4 --ids 1 --print-ids --tokens 2
    check program.log 30 "refused: C no multiple of 8" refused 'hidden_size\|C 36\|head_dim' "$bf16" generate --model dev/test/golden/one_kv --ids 1 --print-ids --tokens 2
    check program.log 60 "refused: 70B does not fit" refused 'memory\|fit' "$bf16" train --model llama3.1-70B --batch 8 --seq 8192 --steps 1 --data "$text" --tokenizer "$LLAMA3_DATA/llama3" --out "$work/huge"
    check program.log 30 "refused: no GPU" env CUDA_VISIBLE_DEVICES= bash -c "refused GPU $bf16 $run --steps 1 --out $work/none"

    local whole="$run --steps 800 --checkpoint-every 100 --keep 0"
    check program.log 90 "a run" "$bf16" $whole --out "$work/whole"
    check program.log 90 "the same run again" "$bf16" $whole --out "$work/again"
    check program.log 10 "  the same bits" same_step "$work/whole" "$work/again" step-00000800
    for signal in TERM KILL; do
        check program.log 120 "a run ended with SIG$signal and resumed" killed "$work/$signal" $signal "$bf16" $whole
        check program.log 10 "  the same bits" same_step "$work/whole" "$work/$signal" step-00000800
    done

    local short="$run --steps 60 --checkpoint-every 20 --keep 0"
    check program.log 120 "60 steps on the CPU" "$cpu" $short --out "$work/cpu"
    check program.log 60 "60 steps on the GPU, FP32" "$fp32" $short --out "$work/fp32"
    check program.log 60 "60 steps on the GPU, BF16" "$bf16" $short --out "$work/bf16"
    check program.log 10 "  losses: FP32 beside the CPU's" close_logs "$work/fp32" "$work/cpu" 1e-3
    check program.log 10 "  losses: BF16 beside the CPU's" close_logs "$work/bf16" "$work/cpu" 1e-2
    check program.log 60 "CPU run resumed on the GPU, FP32" handed_over "$cpu" "$fp32" "$work/h1" "$work/cpu" 1e-3
    check program.log 60 "CPU run resumed on the GPU, BF16" handed_over "$cpu" "$bf16" "$work/h2" "$work/cpu" 1e-2
    check program.log 60 "GPU run resumed on the CPU, FP32" handed_over "$fp32" "$cpu" "$work/h3" "$work/fp32" 1e-3
    check program.log 60 "GPU run resumed on the CPU, BF16" handed_over "$bf16" "$cpu" "$work/h4" "$work/bf16" 1e-2
    check program.log 60 "micro-batches" "$fp32" ${short/--batch 4/--batch 2 --total-batch 256} --out "$work/micro"
    check program.log 10 "  losses: those of the whole batch" close_logs "$work/micro" "$work/fp32" 1e-4
    head -c 50000 "$LLAMA3_DATA/tinystories_val.txt" >"$work/text"
    check program.log 60 "eval: FP32 beside the CPU's" same_loss "$fp32" "$cpu" "$work/whole" 1e-5
    check program.log 60 "eval: BF16 beside the CPU's" same_loss "$bf16" "$cpu" "$work/whole" 3e-3
    check program.log 60 "generate: FP32 beside the CPU's" same_text "$fp32" "$cpu" "$work/whole"
    check program.log 60 "generate: BF16 runs" "$bf16" generate --model "$work/whole" --prompt "ROMEO:" --tokens 60
    check program.log 60 "info" "$bf16" info --model llama3.2-1B
    check program.log 30 "info without a GPU" env CUDA_VISIBLE_DEVICES= "$bf16" info --model llama3.2-1B
    local none="$run --master none --steps 200 --checkpoint-every 50 --keep 0 --dtype BF16"
    check program.log 60 "a run without master weights" "$bf16" $none --out "$work/none1"
    check program.log 60 "the same run again" "$bf16" $none --out "$work/none2"
    check program.log 10 "  the same bits" same_step "$work/none1" "$work/none2" step-00000200
    rm -rf "$work/none2"/step-00000150 "$work/none2"/step-00000200
    check program.log 60 "resumed from step 100" "$bf16" train --resume --out "$work/none2"
    check program.log 10 "  the same bits" same_step "$work/none1" "$work/none2" step-00000200
    check program.log 60 "refused: names what fits" refused '--recompute\|--moments\|--batch' "$bf16" train --model llama3.1-8B --batch 16 --seq 8192 --steps 1 \
        --data "$text" --tokenizer "$LLAMA3_DATA/llama3" --out "$work/big"
}

stage_cli() {
    check program.log 300 "build: black-box tests" make -j"$jobs" DEPS="$deps" build/release/test_cli build/release/test_runs
    for test in test_cli test_runs; do
        check program.log 280 "$test on the GPU program" env LLAMA3_PROGRAM="$(folder FP32)/train_llama3cu" "build/release/$test" ${CLI_TESTS:-}
        show program.log 'FAILED|PASSED'
    done
}

# ---- figures -----------------------------------------------------------------------------------

stage_learn() {
    local bf16 fp32 text=$LLAMA3_DATA/tinyshakespeare.txt begin
    bf16=$(folder BF16)/train_llama3cu fp32=$(folder FP32)/train_llama3cu
    # each line with the second at which it came
    check learn.log 100 "the default run, for 75 s" bash -c "timeout -s INT 75 $bf16 --out $work/default 2>&1 |
        python3 -uc 'import sys, time
t = time.time()
for line in sys.stdin: print(f\"{time.time() - t:6.1f} {line}\", end=\"\")'; true"
    show learn.log '^ +[0-9.]+ +(step|[0-9]+[ /])' 3
    check learn.log 240 "15M on tinyshakespeare beside PyTorch" python3 dev/reference/converge.py --data "$text" --out "$work/converge" \
        BF16="$bf16" FP32="$fp32"
    show learn.log 'steps of|^  '
    for p in BF16 FP32 "PyTorch fp32"; do cp "$work/converge/$p/log.jsonl" "$out/converge-${p// /-}.jsonl"; done
}

# SHAPE as peer_torch.py calls it
preset() { case $1 in 150M) echo llama3-150M ;; 1B) echo llama3.2-1B ;; 3B) echo llama3.2-3B ;; 8B) echo llama3.1-8B ;; *) echo "$1" ;; esac }

random_tokens() { # 4 Mi Llama 3 ids as a .bin file: 256 int32 of header, then uint32
    python3 - "$1" <<'PYTHON'
import sys
import numpy as np
n = 1 << 22
header = np.zeros(256, np.int32)
header[:3] = 20240801, 7, n
with open(sys.argv[1], "wb") as f:
    f.write(header.tobytes() + np.random.default_rng(1).integers(0, 128256, n, dtype=np.uint32).tobytes())
PYTHON
}

# ours NAME SHAPE B T OPTION …: a line with the median of the last twelve steps, and the memory
ours() {
    local name=$1 shape=$2 B=$3 T=$4 log=$work/time-$RANDOM most=0
    shift 4
    [ "$shape" != 8B ] || set -- --moments bf16 "$@" # or it does not fit a card of 141 GB
    (while sleep 0.5; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; done >"$work/used") &
    local watch=$!
    check time.log 200 "$name" "$(folder BF16)/train_llama3cu" train --model "$(preset "$shape")" --data "$work/random.bin" --batch "$B" --seq "$T" \
        --steps 15 --warmup 1 --eval-every 0 --sample-every 0 --checkpoint-every 0 --out "$log" "$@"
    kill $watch 2>/dev/null
    wait $watch 2>/dev/null
    most=$(sort -n "$work/used" | tail -n 1)
    python3 - "$log/log.jsonl" "$name" "$most" <<'PYTHON' | tee -a "$summary" "$out/time.log"
import json, statistics, sys
try:
    rows = [r for r in map(json.loads, open(sys.argv[1])) if "train_loss" in r][-12:]
    print(f'      {sys.argv[2]}: {statistics.median(r["tok_s"] for r in rows):.0f} tok/s, {statistics.median(r["ms"] for r in rows):.1f} ms, '
          f'{int(sys.argv[3] or 0) / 1024:.1f} GiB with the CUDA context, loss {rows[-1]["train_loss"]}')
except (OSError, statistics.StatisticsError) as e:
    print("      no figures:", e)
PYTHON
    show time.log '^(memory|attention|plan)'
}

stage_time() {
    local shape B T spec
    random_tokens "$work/random.bin"
    for spec in ${shapes:-1B,8,2048 150M,32,1024 1B,4,8192 3B,1,8192}; do
        IFS=, read -r shape B T <<<"$spec"
        ours "$spec" "$shape" "$B" "$T"
        if [ -z "${NO_PEER:-}" ] && [ "$shape" != 8B ]; then # whose 8B, with fp32 master weights and moments, does not fit
            check time.log 280 "$spec, PyTorch" python3 "$kit/bench/peer_torch.py" train "$spec,compile,cudnn"
            show time.log '"what": "train"'
        fi
        ours "$spec, --fast-attention" "$shape" "$B" "$T" --fast-attention
        ours "$spec, --recompute norms" "$shape" "$B" "$T" --recompute norms
    done
}

# dev/cuda: the harness judged, each file checked, then timed beside the peers; results.jsonl comes back, from which
# make -C dev/cuda charts makes tables and pictures anywhere. LAB_FILES="rmsnorm rope …" takes those alone, LAB_SECONDS bounds the report,
# LAB_NCU of them are spent under ncu
stage_lab() {
    local lab=build/lab/cuda extra=build/cuda-extra program programs="" file
    make_extra
    ln -sf "$deps"/include/cudnn* "$extra/include/"
    check lab.log 500 "build: lab" make -k -C dev/cuda -j"$jobs" CUDA_EXTRA="$root/$extra" all
    grep -E 'error( |:)|: \*\*\*' "$out/lab.log" | sort -u | head -n 20 | cut -c1-200 | tee -a "$summary"
    check lab.log 60 "lab: selftest" "$lab/selftest-BF16"
    for program in "$lab"/*-BF16; do
        file=$(basename "$program" -BF16)
        case " ${LAB_FILES:-$file} " in *" ${file%%_*} "* | *" $file "*) ;; *) continue ;; esac
        case $file in selftest | flags) continue ;; esac
        programs="$programs $program"
        [ "$file" = device_info ] || check lab.log 60 "lab: $file" "$program" --check
        [ "$file" = device_info ] || show lab.log 'WRONG|error|fault' 8
    done
    check lab.log "$((${LAB_SECONDS:-300} + 60))" "lab: report" python3 scripts/report_bench.py run --out "$out/results.jsonl" \
        --seconds "${LAB_SECONDS:-300}" --ncu "${LAB_NCU:-0}" ${LAB_PEERS:+--peers dev/cuda/peers.py} $programs
}

stage_profile() {
    local spec=${shapes# } shape B T
    spec=${spec:-1B,8,2048}
    IFS=, read -r shape B T <<<"${spec%% *}"
    random_tokens "$work/random.bin"
    local run="$(folder BF16)/train_llama3cu train --model $(preset "$shape") --data $work/random.bin --batch $B --seq $T --warmup 1
        --eval-every 0 --sample-every 0 --checkpoint-every 0"
    check profile.log 200 "time of each kernel" $run --steps 6 --out "$work/timing" --timing
    last profile.log '.' | tail -n 45 | cut -c1-150 | tee -a "$summary"
    check profile.log 200 "make profile" make_gpu PRECISION=BF16 profile OP=rmsnorm_backward ARGS="--model 350M --seq 1024 --batch 4"
    show profile.log '_kernel.*Context|Memory Throughput  *%|Achieved Occupancy' 6
}

# ---- -----------------------------------------------------------------------------------------

stages="" shapes=""
for argument in "$@"; do
    case $argument in
        machine | build | ops | model | program | cli | sanitize | sanitize_lab | learn | time | profile | lab) stages="$stages $argument" ;;
        *,*,*) shapes="$shapes $argument" ;;
        *) echo "error: no stage $argument: see the head of $0" >&2 && exit 1 ;;
    esac
done
export root kit out deps jobs work
export -f $(compgen -A function)
rm -f "$out"/*.log "$summary"
for stage in ${stages:-machine build ops model program}; do
    say "== $stage"
    "stage_$stage"
done
say "== $((SECONDS - start)) s; $(grep -c '^ok ' "$summary") ok, $(grep -c '^FAIL' "$summary") failed, $(grep -c '^TIME' "$summary") out of time"
! grep -q '^FAIL\|^TIME' "$summary"

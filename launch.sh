#!/usr/bin/env bash
# The one entry.
#
#   ./launch.sh                the whole job on the embedded default: pairs, triples, CPO, fusion, evaluation, report
#   ./launch.sh rounds         the same, and two on-policy rounds after it: its own outputs become the dis-preferred ones
#   ./launch.sh test [ARGS]    the tests (ARGS go to pytest); test-distributed: those of several processes and machines
#   ./launch.sh train [ARGS]   scripts/train_pref.py on every GPU of this machine, or on its CPU
#   ./launch.sh paper [ARGS]   the paper's Tables 1 to 4: --dry_run prints plan and commands; --scale demo, on a CPU
#   ./launch.sh page           a page for the embedded default's own system, once ./launch.sh has made it
#   ./launch.sh bench          all benchmarks, side by side with their peers
#   ./launch.sh bench-gpu [PART...]    what a GPU has to tell, in parts (benchmarks/gpu.py); on a CPU at a toy scale
#
# Each first makes .venv with what requirements.txt pins, the tests with requirements-test.txt's too (VENV=FOLDER: uses
# that one as it is). Finished stages of the demo are skipped; a stage that was killed goes on where it was. Where
# `train` runs (docs/cluster.md):
#
#   NPROC_PER_NODE=4 STRATEGY=zero3 ./launch.sh train ...    # default: a process a GPU; accelerate_configs/ddp.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./launch.sh train ...    # on 10.0.0.1; the other has NODE_RANK=1
#   sbatch --nodes 2 --gpus-per-node 8 launch.sh train ...   # saves and requeues itself before its time is over
#
#SBATCH --job-name=lmolt --requeue --open-mode=append --signal=USR1@120
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ -d lmolt ]] || cd "${SLURM_SUBMIT_DIR:-.}" # sbatch runs a copy of this file, from elsewhere
[[ -d lmolt ]] || { echo "error: run sbatch in the folder of launch.sh" >&2; exit 2; }

PYTHON=${PYTHON:-python3}
DEMO=runs/demo
SUPERVISOR=(env)

# one of the machines that share this folder installs, under a lock that names it, and the others wait
INSTALL='
import sys, time
sys.path.insert(0, ".")
from pathlib import Path
from subprocess import run
from lmolt.ownership import hold
file, installed, wanted = sys.argv[1:]
said = ""
while True:
    try:
        hold(".venv", beside=True)
        break
    except ValueError as error:
        who = str(error).partition(" is being written by ")[2].partition(";")[0]
        if who != said:
            print(f"waits for the set-up of .venv by {who}", flush=True)
        said = who
        time.sleep(2)
if not Path(installed).exists() or Path(installed).read_text().strip() != wanted:
    print(f"== set-up: .venv, {file}", flush=True)
    run([sys.executable, "-m", "venv", ".venv"], check=True)
    run([".venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", file], check=True)
    Path(installed).write_text(wanted)
'

# set_up [FILE]: .venv with what requirements.txt and FILE pin
set_up() {
    local file wanted installed
    for file in requirements.txt "$@"; do
        wanted=$(cksum <"$file") installed=.venv/installed-${file//\//-}
        [[ -z ${VENV:-} && $(cat "$installed" 2>/dev/null) != "$wanted" ]] || continue
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: Python 3.11 or newer is needed; point PYTHON to one" >&2; exit 2; }
        "$PYTHON" -c "$INSTALL" "$file" "$installed" "$wanted"
    done
    export PATH="${VENV:-$PWD/.venv}/bin:$PATH" TOKENIZERS_PARALLELISM=false
}

# launch SCRIPT ARGS: in as many processes as there are GPUs; one process needs no launcher
launch() {
    local processes nodes=${NNODES:-1} launcher=(python)
    if [[ -z ${NPROC_PER_NODE:-} && -z ${GPUS:-} ]]; then # as torch sees them: NVIDIA's, AMD's, Intel's; Apple's is none
        GPUS=$(python -c 'import torch; a = torch.accelerator
print(a.device_count() if a.is_available() and a.current_accelerator().type != "mps" else 0)')
    fi
    processes=$((nodes * ${NPROC_PER_NODE:-$((GPUS > 1 ? GPUS : 1))}))
    if ((processes > 1 || ${GPUS:-1} > 1)) || [[ ${STRATEGY:-} ]]; then
        launcher=(accelerate launch --quiet --config_file "accelerate_configs/${STRATEGY:-ddp}.yaml"
            --num_processes "$processes" --num_machines "$nodes" --machine_rank "${NODE_RANK:-0}"
            --main_process_port "${MASTER_PORT:-29500}")
    fi
    ((nodes == 1)) ||
        launcher+=(--main_process_ip "$MASTER_ADDR" --same_network --deepspeed_multinode_launcher standard)
    "${SUPERVISOR[@]}" "${launcher[@]}" "$@"
}

# this machine's part of a training run
train() {
    [[ -z ${NNODES:-} || ${NNODES} == 1 || ${MASTER_ADDR:-} ]] ||
        { echo "error: NNODES=$NNODES needs MASTER_ADDR, and NODE_RANK on each" >&2; exit 2; }
    export MASTER_PORT=${MASTER_PORT:-29500}
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # passed on to each process,
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600                         # which then finishes its step and saves
    SUPERVISOR=(exec python -m lmolt.distributed.supervisor)
    launch scripts/train_pref.py "$@"
}

# under Slurm: `train` once on each machine of the allocation; if it was asked to stop, the job queues again
slurm() {
    export NNODES=$SLURM_JOB_NUM_NODES MASTER_ADDR LMOLT_SECRET
    export MASTER_PORT=${MASTER_PORT:-$((10000 + 2 * (SLURM_JOB_ID % 10000)))} # and the port after it
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    LMOLT_SECRET=${LMOLT_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
    ((${SLURM_RESTART_COUNT:-0} == 0)) || set -- "$@" --resume_from_checkpoint true
    local status=0 container
    read -ra container <<<"${LMOLT_CONTAINER:-}"
    srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --cpus-per-task "$SLURM_CPUS_ON_NODE" \
        ${container[@]+"${container[@]}"} ./launch.sh node "$@" || status=$?
    if ((status == 75)); then
        if ((${SLURM_RESTART_COUNT:-0} < ${LMOLT_MAX_RESTARTS:-100})); then
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "error: not queued again: that was restart $SLURM_RESTART_COUNT, LMOLT_MAX_RESTARTS allows no more" >&2
        fi
    fi
    exit $status
}

# the task that srun starts on each machine
node() {
    export NODE_RANK=$SLURM_NODEID NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    local threads=$((SLURM_CPUS_ON_NODE / NPROC_PER_NODE))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
    train "$@"
}

# stage NAME FILE COMMAND...: run the command unless the file, which appears last and whole, is there
stage() {
    local name=$1 leaves=$2
    shift 2
    if [[ -e $leaves ]]; then
        echo "== $name: done ($leaves)"
        return
    fi
    echo "== $name"
    echo "   $*"
    "$@"
}

evaluate() { # NAME MODEL [--adapter ADAPTER]
    local name=$1 model=$2
    shift 2
    stage "evaluate $name" "$DEMO/evaluation/$name/metrics.json" \
        launch scripts/evaluate.py --model "$model" "$@" --pairs demo --limit 200 --max_new_tokens 128 --output "$DEMO/evaluation/$name"
}

tables() { # REPORT: of both directions, and whether captions tell of their molecules; the rest is in the report
    sed -e '/^\*\*Table 3/,/^\*\*Table 6/{/Table 6/!d}' -e '/^\*\*Table 7/,$d' "$1"
}

demo() {
    export DS_ACCELERATOR=cpu # DeepSpeed has no part in this, but would say at each import that it sees no GPU
    local models=$DEMO/models train="scripts/train_pref.py --recipe recipes/demo.yaml --resume_from_checkpoint true"
    stage "pairs and stand-in models" "$models/finished" python -m lmolt.demo.build
    stage "triples" "$DEMO/triples.parquet" \
        launch scripts/make_triples.py --recipe recipes/demo_triples.yaml
    # shellcheck disable=SC2086  # $train is several words
    stage "CPO" "$DEMO/cpo/adapter_model.safetensors" launch $train --output_dir "$DEMO/cpo"
    stage "SLERP 19:1" "$DEMO/slerp/config.json" \
        python scripts/merge.py --method slerp --models "$models/cap2mol" "$models/mol2cap" --weights 0.95 0.05 \
        --output "$DEMO/slerp"
    # shellcheck disable=SC2086
    stage "SLERP + CPO" "$DEMO/slerp_cpo/adapter_model.safetensors" \
        launch $train --model "$DEMO/slerp" --output_dir "$DEMO/slerp_cpo"
    evaluate start "$models/cap2mol"
    evaluate cpo "$models/cap2mol" --adapter "$DEMO/cpo"
    evaluate slerp_cpo "$DEMO/slerp" --adapter "$DEMO/slerp_cpo"
    stage "report" "$DEMO/report/report.html" \
        python scripts/evaluate.py --compare "$DEMO"/evaluation/{start,cpo,slerp_cpo} --baseline start \
        --output "$DEMO/report"
    tables "$DEMO/report/report.md"
    echo "report: $PWD/$DEMO/report/report.html"
}

# two on-policy rounds after the demo's CPO: the model in training is its own translator (docs/data.md)
rounds() {
    local round model=$DEMO/models/cap2mol adapter=$DEMO/cpo
    for round in 1 2; do
        stage "round $round: triples" "$DEMO/round_$round.parquet" \
            launch scripts/make_triples.py --recipe recipes/demo_triples.yaml --seed "$round" \
            --mol2cap_model "$model" --mol2cap_adapter "$adapter" --cap2mol_model "$model" --cap2mol_adapter "$adapter" \
            --num_candidates 4 --num_rejected 2 --output "$DEMO/round_$round.parquet"
        stage "round $round: CPO" "$DEMO/round_$round/adapter_model.safetensors" \
            launch scripts/train_pref.py --recipe recipes/demo.yaml --triples "$DEMO/round_$round.parquet" \
            --adapter "$adapter" --output_dir "$DEMO/round_$round" --resume_from_checkpoint true
        adapter=$DEMO/round_$round
        evaluate "round_$round" "$model" --adapter "$adapter"
    done
    stage "report of the rounds" "$DEMO/rounds/report.html" \
        python scripts/evaluate.py --compare "$DEMO"/evaluation/{start,cpo,round_1,round_2} --baseline cpo \
        --output "$DEMO/rounds"
    tables "$DEMO/rounds/report.md"
}

case ${1:-demo} in
    demo) set_up && demo ;;
    rounds) set_up && demo && rounds ;;
    test) set_up requirements-test.txt && shift && python -m pytest -m "not slow" -n 2 --dist loadscope "$@" ;; # one thread each
    test-distributed) set_up requirements-test.txt && shift && python -m pytest -m slow -n 2 --dist loadscope "$@" ;;
    train)
        # with LMOLT_CONTAINER, nothing but the container's own Python runs, on each machine
        [[ ${LMOLT_CONTAINER:-} && -z ${SLURM_STEP_ID:-} ]] || set_up
        shift
        if [[ ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then slurm "$@"; else train "$@"; fi
        ;;
    node) set_up && shift && node "$@" ;;
    paper) set_up && shift && python scripts/paper.py "$@" ;;
    page)
        set_up && shift
        python -c "import gradio" 2>/dev/null || pip install --quiet "gradio>=6,<7"
        python scripts/translate.py --serve --model "$DEMO/slerp" --adapter "$DEMO/slerp_cpo" --pairs demo \
            --max_new_tokens 128 "$@"
        ;;
    bench)
        set_up benchmarks/requirements.txt && mkdir -p runs/bench
        for benchmark in benchmarks/*.py; do
            case $benchmark in # they need a GPU, or a clone of somebody's repository
                */gpu*.py | */lpm24_submissions.py | */molt5_stereo.py) continue ;;
            esac
            echo "== $benchmark"
            python "$benchmark" --json "runs/bench/$(basename "$benchmark" .py).json"
        done
        ;;
    bench-gpu) set_up && shift && python benchmarks/gpu.py "$@" ;;
    *) sed -n '2,20s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac

#!/usr/bin/env bash
# The one entry.
#
#   ./launch.sh                the whole job on the embedded default: pairs, triples, CPO, fusion, evaluation, report
#   ./launch.sh test [ARGS]    the test suite (arguments go to pytest)
#   ./launch.sh train [ARGS]   scripts/train_pref.py under accelerate, on every GPU of this machine or on its CPU
#   ./launch.sh bench          all benchmarks, side by side with their peers
#
# Each first makes .venv with what requirements.txt pins. Finished stages of the demo are skipped; a stage that was
# killed goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python3}
DEMO=runs/demo

set_up() {
    local wanted
    wanted=$(cksum <requirements.txt)
    if [[ $(cat .venv/installed 2>/dev/null) != "$wanted" ]]; then
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: Python 3.11 or newer is needed; point PYTHON to one" >&2; exit 2; }
        echo "== set-up: .venv, requirements.txt"
        "$PYTHON" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "${1:-requirements.txt}"
        echo "$wanted" >.venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
}

# accelerate, on the CPU where there is no GPU, in as many processes as there are GPUs
launch() {
    local gpus
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    case $gpus in
        0) accelerate launch --quiet --config_file accelerate_configs/cpu.yaml "$@" ;;
        1) accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml "$@" ;;
        *) accelerate launch --quiet --config_file accelerate_configs/ddp.yaml --num_processes "$gpus" "$@" ;;
    esac
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

demo() {
    local models=$DEMO/models train="scripts/train_pref.py --recipe recipes/demo.yaml --resume_from_checkpoint true"
    stage "pairs and stand-in models" "$models/finished" python -m lmolt.demo
    stage "triples" "$DEMO/triples.parquet" \
        launch scripts/make_triples.py --pairs demo --fraction 0.3 --max_new_tokens 128 \
        --mol2cap_model "$models/t5_mol2cap" --cap2mol_model "$models/t5_cap2mol" --output "$DEMO/triples.parquet"
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
    sed "/^\*\*Table 3/,\$d" "$DEMO/report/report.md" # the tables of both directions; the rest is in the report
    echo "report: $PWD/$DEMO/report/report.html"
}

case ${1:-demo} in
    demo) set_up && demo ;;
    test) set_up && shift && python -m pytest -n 2 --dist loadscope "$@" ;; # two at a time: the tests use one thread each
    train) set_up && shift && launch scripts/train_pref.py "$@" ;;
    bench)
        set_up && pip install --quiet -r benchmarks/requirements.txt && mkdir -p runs/bench
        for benchmark in benchmarks/*.py; do
            echo "== $benchmark"
            python "$benchmark" --json "runs/bench/$(basename "$benchmark" .py).json"
        done
        ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac

#!/usr/bin/env bash
# A policy for MT10 at 20 Hz whose answers take most of a step, so that each action is one step late: chunks of three that
# continue what is executed, from the policy of the package, and the mean of each distribution in place of its most
# probable bin. What was tried before, and why: docs/LOG.md, 2026-11-27. Some two hours of one core with bfloat16.
#
#     bash studies/one_step_late.sh outputs/late
#
# Every command continues where it was stopped. PRECISION=float32 on a CPU without bfloat16.
set -euo pipefail
output=${1:-outputs/late}
mkdir -p "$output"

record() { # NAME OPTIONS: demonstrations, also in the mixture of what is trained afterwards
    openvla record --after-success 6 --workers "${WORKERS:-1}" --output "$output/$1" "${@:2}"
    grep -qs "^$1:" "$output/mixture.yaml" || printf '%s:\n  path: %s\n' "$1" "$(realpath "$output/$1")" >> "$output/mixture.yaml"
}
learn() { # NAME STEPS SEED OPTIONS: from what was recorded when it began
    test -e "$output/$1.yaml" || cp "$output/mixture.yaml" "$output/$1.yaml"
    openvla finetune --strategy full --dataset "$output/$1.yaml" --held-out 0.03 --no-image-aug --batch-size 64 \
        --precision "${PRECISION:-bf16}" --optimizer muon --weight-decay 0.05 --learning-rate 1e-3 --schedule linear \
        --warmup-steps 20 --steps "$2" --seed "$3" --shuffle-buffer 20000 --save-every 250 --eval-every 250 \
        --output "$output/$1" --resume "${@:4}"
}

record metaworld --tasks mt10 --episodes "${EPISODES:-45}" --noise 0.2 --delay 2
record plain --tasks mt10 --episodes "${MORE:-60}" --seed 5000 --noise 0.2 --delay 2
learn first "${STEPS:-1000}" 0 --chunk 3
# What it should have done where it drove: of all tasks, and of those that it did worst.
student=(--student "$output/first" --unnorm-key metaworld --latency 0.05)
record dagger --tasks mt10 --episodes "${DRIVEN:-20}" --seed 9000 "${student[@]}"
record dagger2 --tasks window-open-v3,window-close-v3 --episodes "${WORST:-30}" --seed 7000 "${student[@]}"
record dagger3 --tasks button-press-topdown-v3,peg-insert-side-v3 --episodes "${WORST:-30}" --seed 7000 "${student[@]}"
learn second "${STEPS:-1000}" 1 --model "$output/first"
learn third "${LAST:-650}" 2 --model "$output/second"

OMP_NUM_THREADS=1 openvla evaluate --model "$output/third" --unnorm-key metaworld --dtype float32 --tasks mt10 \
    --episodes "${EVALUATED:-10}" --workers 1 --videos 0 --control realtime --chunking prefix --decoding mean --output "$output/loop"

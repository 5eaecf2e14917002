#!/bin/sh
# Every method by every task that needs no network, with the embedded model and the adapter in the package: the tables of
# results/evaluation. Hours on 2 cores; a run that was stopped goes on. Cheap methods at all lengths, those that attend to
# the whole text where that takes minutes at most.
#
#     benchmarks/evaluation.sh DATA RUNS [NAME...]
#
# DATA: the folder with books/test and bench. RUNS: where runs go. NAME: only these runs.
set -eu
data=$1 runs=$2
shift 2
names=${*:-perplexity perplexity-scaled passkey passkey-scaled made-up made-up-16k ruler ruler-16k babilong published}

cheap="--method focus --method streaming --method retrieval"
whole="--method full --method truncate"
scaled="--method pi --method ntk --method yarn"
ruler="ruler-niah_single_1 ruler-niah_single_2 ruler-niah_single_3 ruler-niah_multikey_1 ruler-niah_multikey_2
    ruler-niah_multikey_3 ruler-niah_multivalue ruler-niah_multiquery ruler-vt ruler-cwe ruler-fwe"
made_up="needle number-string key-value math-find document"

run() {
    output=$runs/$1
    shift
    focusllm eval run "$@" --dtype bfloat16 --text "$data/books/test" --output "$output"
}

for name in $names; do
    case $name in
    # shellcheck disable=SC2086  # the lists above are meant to be split
    perplexity) run $name perplexity --lengths 4k,8k,16k,32k,64k,128k --limit 10 \
        --method focus --method focus:chunk_length=256 --method streaming --method truncate:to=local ;;
    perplexity-scaled) run $name perplexity --lengths 4k,8k,16k --limit 4 --method full $scaled ;;
    passkey) run $name passkey --lengths 4k,8k,16k,32k,64k,128k --limit 10 \
        --method focus --method streaming --method truncate:to=local ;;
    passkey-scaled) run $name passkey --lengths 4k,8k,16k --limit 3 --method full $scaled ;;
    made-up) run $name $made_up --lengths 4k --limit 10 $cheap --method full ;;
    made-up-16k) run $name $made_up --lengths 16k --limit 10 $cheap ;;
    ruler) run $name $ruler --lengths 4k --limit 5 $cheap --method full ;;
    ruler-16k) run $name $ruler --lengths 16k --limit 5 $cheap ;;
    babilong) run $name babilong --lengths 4k,16k --limit 5 $cheap --data "$data/bench/babi_en" ;;
    published) run $name longbench leval lost-in-the-middle --limit 3 $cheap $whole --data "$data/bench" ;;
    *) echo "there is no run $name" >&2 && exit 2 ;;
    esac
done

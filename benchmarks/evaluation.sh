#!/bin/sh
# Methods by tasks with the embedded model. A run that was stopped goes on. NAME is a run of the methods that do not depend on
# an adapter, NAME-focus one of FocusLLM with the adapter in the package: another adapter needs these alone. NAME-snapkv is
# SnapKV, apart as any method that comes later can be. Together:
#
#     benchmarks/evaluation.sh DATA RUNS [NAME...]
#     focusllm eval report RUNS/ruler RUNS/ruler-focus RUNS/ruler-snapkv --output RUNS/ruler-report
#
# DATA: the folder with books/test and bench. RUNS: where runs go. NAME: only these. All that are run without a NAME take half a day
# to a day on two cores, in two shells that share the names between them, each with OMP_NUM_THREADS=1. `perplexity-scaled` and `ruler-16k`
# are for a GPU: there methods attend to the whole of texts beyond 8192 tokens, which takes minutes to hours a text on a CPU.
set -eu
data=$1 runs=$2 books=$1/books/test
shift 2
names=${*:-made-up keys ruler passkey passkey-paper babilong leval longbench perplexity
    made-up-focus keys-focus ruler-focus passkey-focus passkey-paper-focus babilong-focus leval-focus longbench-focus ruler-16k-focus perplexity-focus
    passkey-long needle-long babilong-long passkey-long-focus needle-long-focus babilong-long-focus
    made-up-snapkv keys-snapkv ruler-snapkv passkey-snapkv passkey-paper-snapkv babilong-snapkv leval-snapkv longbench-snapkv perplexity-snapkv}

cheap="--method streaming --method retrieval"
whole="--method full --method truncate"
scaled="--method pi --method ntk --method yarn"
lengths="--lengths 4k,8k,16k,32k,64k,128k"
longer="--lengths 32k,64k,128k"
needles="ruler-niah_single_1 ruler-niah_single_2 ruler-niah_single_3 ruler-niah_multikey_1 ruler-niah_multikey_2
    ruler-niah_multikey_3 ruler-niah_multivalue ruler-niah_multiquery"
longbench=$(for file in "$data"/bench/longbench_v1_mini/*.jsonl; do echo "longbench-$(basename "$file" .jsonl)"; done)

# Only books of more than 128K tokens, so that all lengths have the same labels.
long=$runs/.long-books
mkdir -p "$long"
for book in herman_melville__moby_dick king_james_bible leo_tolstoy__war_and_peace victor_hugo__les_miserables; do
    ln -sf "$(cd "$books" && pwd)/$book.txt" "$long/"
done

# run NAME TEXT "METHODS" TASK-OPTION...: those methods without an adapter, or the one that NAME ends in.
run() {
    name=$1 text=$2 methods="--adapter none $3"
    shift 3
    case $name in
    *-focus) methods="--method focus" ;;
    *-snapkv) methods="--adapter none --method snapkv" ;;
    esac
    # shellcheck disable=SC2086  # a list of options
    focusllm eval run "$@" --model smollm2-135m $methods --dtype bfloat16 --text "$text" --output "$runs/$name"
}

for name in $names; do
    kind=${name%-focus}
    kind=${kind%-snapkv}
    # shellcheck disable=SC2086  # the lists above are meant to be split
    case $kind in
    made-up) run $name "$books" "$cheap --method full" needle number-string key-value math-find document --lengths 4k --limit 5 ;;
    keys) run $name "$books" "$cheap $whole" lost-in-the-middle-75 lost-in-the-middle-140 --limit 10 --data "$data/bench" ;;
    ruler) run $name "$books" "$cheap --method full" $needles ruler-vt ruler-cwe ruler-fwe --lengths 4k --limit 3 ;;
    passkey) run $name "$books" "$cheap --method truncate:to=local --method full" passkey --lengths 4k,16k --limit 10 ;;
    passkey-paper) run $name "$books" "$cheap --method full" passkey-paper --lengths 4k,16k --limit 10 ;;
    babilong) run $name "$books" "$cheap --method full" babilong-qa1 babilong-qa2 babilong-qa3 --lengths 4k,16k --limit 5 --data "$data/bench/babi_en" ;;
    leval) run $name "$books" "$cheap $whole" leval --limit 2 --data "$data/bench/leval" ;;
    longbench) run $name "$books" "$cheap --method truncate" $longbench --limit 1 --data "$data/bench/longbench_v1_mini" ;;
    passkey-long) run $name "$books" "$cheap" passkey $longer --limit 5 ;;
    needle-long) run $name "$books" "$cheap" needle $longer --limit 5 ;;
    babilong-long) run $name "$books" "$cheap" babilong-qa1 babilong-qa2 babilong-qa3 --lengths 32k --limit 2 --data "$data/bench/babi_en" ;;
    ruler-16k) run $name "$books" "$cheap --method yarn" $needles --lengths 16k --limit 2 ;;
    perplexity) run $name "$long" "--method streaming --method truncate:to=local --method full" perplexity $lengths --limit 4 ;;
    perplexity-scaled) run $name "$long" "$scaled" perplexity $lengths --limit 4 ;;
    *) echo "there is no run $name" >&2 && exit 2 ;;
    esac
done

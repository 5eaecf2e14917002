#!/bin/sh
# Methods by tasks with the embedded model and the adapter in the package, 4K to 128K tokens. A run that was stopped goes on.
# Made for a GPU, where all runs side by side take some minutes; on a CPU those of 4K tokens take hours, the others days.
#
#     benchmarks/evaluation.sh DATA RUNS [NAME...]
#
# DATA: the folder with books/test and bench. RUNS: where runs go. NAME: only these runs (they may run side by side).
set -eu
data=$1 runs=$2 books=$1/books/test
shift 2
names=${*:-perplexity passkey made-up pairs document ruler ruler-16k ruler-other babilong keys longbench-qa longbench-code
    longbench-few longbench-summaries leval}

cheap="--method focus --method streaming --method retrieval"
whole="--method full --method truncate"
scaled="--method pi --method ntk --method yarn"
lengths="--lengths 4k,8k,16k,32k,64k,128k"
needles="ruler-niah_single_1 ruler-niah_single_2 ruler-niah_single_3 ruler-niah_multikey_1 ruler-niah_multikey_2
    ruler-niah_multikey_3 ruler-niah_multivalue ruler-niah_multiquery"

# Only books of more than 128K tokens, so that all lengths have the same labels.
long=$runs/.long-books
mkdir -p "$long"
for book in herman_melville__moby_dick king_james_bible leo_tolstoy__war_and_peace victor_hugo__les_miserables; do
    ln -sf "$(cd "$books" && pwd)/$book.txt" "$long/"
done

run() {
    name=$1 text=$2
    shift 2
    focusllm eval run "$@" --dtype bfloat16 --text "$text" --output "$runs/$name"
}

longbench() {
    name=$1 limit=$2 tasks=""
    shift 2
    for task in "$@"; do tasks="$tasks longbench-$task"; done
    # shellcheck disable=SC2086
    run "$name" "$books" $tasks --limit "$limit" $cheap $whole --data "$data/bench/longbench_v1_mini"
}

for name in $names; do
    case $name in
    # shellcheck disable=SC2086  # the lists above are meant to be split
    perplexity) run $name "$long" perplexity $lengths --limit 4 --method focus --method streaming --method truncate:to=local --method full $scaled ;;
    passkey) run $name "$books" passkey $lengths --limit 10 $cheap --method truncate:to=local --method full $scaled ;;
    made-up) run $name "$books" needle number-string --lengths 4k,16k,64k --limit 5 $cheap --method full --method yarn ;;
    pairs) run $name "$books" key-value math-find --lengths 4k,16k,64k --limit 5 $cheap --method full --method yarn ;;
    document) run $name "$books" document --lengths 4k,16k,64k --limit 5 $cheap --method full --method yarn ;;
    ruler) run $name "$books" $needles --lengths 4k --limit 3 $cheap --method full ;;
    ruler-16k) run $name "$books" $needles --lengths 16k --limit 2 $cheap --method yarn ;;
    ruler-other) run $name "$books" ruler-vt ruler-cwe ruler-fwe --lengths 4k,16k --limit 3 $cheap --method full --method yarn ;;
    babilong) run $name "$books" babilong-qa1 babilong-qa2 babilong-qa3 --lengths 4k,16k,64k --limit 10 $cheap --method full --method yarn --data "$data/bench/babi_en" ;;
    keys) run $name "$books" lost-in-the-middle --limit 10 $cheap $whole --data "$data/bench" ;;
    longbench-qa) longbench $name 5 narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique ;;
    longbench-code) longbench $name 5 lcc repobench-p ;;
    longbench-few) longbench $name 5 trec triviaqa passage_count passage_retrieval_en ;;
    longbench-summaries) longbench $name 3 gov_report qmsum multi_news samsum ;;
    leval) run $name "$books" leval --limit 5 $cheap $whole --data "$data/bench/leval" ;;
    *) echo "there is no run $name" >&2 && exit 2 ;;
    esac
done

#!/bin/sh
# Methods by tasks with the embedded model and the adapter in the package, as far as that takes hours and no network. A run
# that was stopped goes on. Perplexity and passkey go to 128K tokens; the other made-up
# tasks have 4K and 16K. Methods that attend to the whole text are run where that takes minutes a text at most, the scaled
# ones beyond the base model's 8192 positions only (below, they are `full`).
#
#     benchmarks/evaluation.sh DATA RUNS [NAME...]
#
# DATA: the folder with books/test and bench. RUNS: where runs go. NAME: only these runs. Two shells that share the names
# between them, each with OMP_NUM_THREADS=1, use two cores well.
set -eu
data=$1 runs=$2 books=$1/books/test
shift 2
names=${*:-perplexity perplexity-full perplexity-scaled passkey passkey-full passkey-scaled made-up made-up-16k ruler
    ruler-16k babilong keys longbench leval}

cheap="--method focus --method streaming --method retrieval"
whole="--method full --method truncate"
scaled="--method pi --method ntk --method yarn"
lengths="--lengths 4k,8k,16k,32k,64k,128k"
ruler="ruler-niah_single_1 ruler-niah_single_2 ruler-niah_single_3 ruler-niah_multikey_1 ruler-niah_multikey_2
    ruler-niah_multikey_3 ruler-niah_multivalue ruler-niah_multiquery ruler-vt ruler-cwe ruler-fwe"
made_up="needle number-string key-value math-find document"
longbench=$(for file in "$data"/bench/longbench_v1_mini/*.jsonl; do echo "longbench-$(basename "$file" .jsonl)"; done)

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

for name in $names; do
    case $name in
    # shellcheck disable=SC2086  # the lists above are meant to be split
    perplexity) run $name "$long" perplexity $lengths --limit 4 --method focus --method streaming --method truncate:to=local ;;
    perplexity-full) run $name "$long" perplexity --lengths 4k,8k --limit 4 --method full ;;
    perplexity-scaled) run $name "$long" perplexity --lengths 16k --limit 4 $scaled ;;
    passkey) run $name "$books" passkey $lengths --limit 10 --method focus --method streaming --method truncate:to=local ;;
    passkey-full) run $name "$books" passkey --lengths 4k,8k --limit 10 --method full ;;
    passkey-scaled) run $name "$books" passkey --lengths 16k --limit 3 $scaled ;;
    made-up) run $name "$books" $made_up --lengths 4k --limit 5 $cheap --method full ;;
    made-up-16k) run $name "$books" $made_up --lengths 16k --limit 3 $cheap ;;
    ruler) run $name "$books" $ruler --lengths 4k --limit 3 $cheap --method full ;;
    ruler-16k) run $name "$books" $ruler --lengths 16k --limit 2 $cheap ;;
    babilong) run $name "$books" babilong-qa1 babilong-qa2 babilong-qa3 --lengths 4k,16k --limit 5 $cheap --data "$data/bench/babi_en" ;;
    keys) run $name "$books" lost-in-the-middle --limit 5 $cheap $whole --data "$data/bench" ;;
    longbench) run $name "$books" $longbench --limit 2 $cheap $whole --data "$data/bench/longbench_v1_mini" ;;
    leval) run $name "$books" leval --limit 3 $cheap $whole --data "$data/bench/leval" ;;
    *) echo "there is no run $name" >&2 && exit 2 ;;
    esac
done

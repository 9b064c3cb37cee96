#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What every driver owes to whoever runs it: lost output is an error, an interrupt leaves nothing, numbers are refused in
# words, what is not finite is no result. Each with its control. Usage: drivers_test.sh output|interrupts|numbers|finite|
# sessions ROOT BIN SCRATCH [SPOIL_MODEL]
set -uo pipefail
set -m # a job of its own for what runs in the background: without, a shell has it ignore SIGINT
part=$1 root=$2 bin=$(cd "$3" && pwd) scratch=$4 spoil=${5:-}
data=$root/tests/data/nano
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
rm -rf "$scratch" && mkdir -p "$scratch" && cd "$scratch" || exit 1
status=0
fail() { echo "FAILED: $*" && status=1; }
drivers=$(sed -n 's/^gemma4_experiment(\([a-z_]*\)).*/\1/p' "$root/experiments/CMakeLists.txt")
nothing_left() { # nothing_left WHO: no partial file in the scratch folder
  local left
  left=$(find . -name '*.partial-*')
  [ -z "$left" ] || { fail "$1 left $left" && rm -f $left; }
}
# Commands, not functions: a signal to what runs in the background must reach the driver itself.
accuracy=("$bin/accuracy" --model "$data/nano-Q4_K_M.gguf" --ids "$data/heldout-ids.u16" --contexts 24 --chunk 12 --cache bf16 --quiet)
whole_lines() { # whole_lines FILE: every line of a CSV has as many cells as the header
  [ ! -e "$1" ] && return
  [ -s "$1" ] || fail "$1 is empty"
  [ -z "$(tail -c 1 "$1")" ] || fail "$1: its last line is not whole"
  awk 'BEGIN {FPAT = "([^,]*)|(\"([^\"]|\"\")*\")"} {gsub(/"([^"]|"")*"/, "q"); n = gsub(/,/, ","); if (NR == 1) first = n; else if (n != first) exit 1}' "$1" ||
    fail "$1: rows of another length than the header"
}

# ---- lost output

lost() { # lost WHO COMMAND...: to a full disk, to a pipe that nobody reads, to nothing at all; the control is a file
  local who=$1 said code where
  shift
  "$@" > out.txt 2> err.txt || fail "$who: code $? although its output could be written: $(cat err.txt)"
  [ -s out.txt ] || fail "$who: printed nothing"
  for where in full pipe closed; do
    case $where in
      full) said=$("$@" 2>&1 > /dev/full); code=$? ;;
      pipe) { sleep 0.1; "$@" 2> err.txt; echo $? > code.txt; } | true; code=$(cat code.txt) said=$(cat err.txt) ;;
      closed) said=$("$@" 2>&1 >&-); code=$? ;;
    esac
    [ "$code" = 1 ] || fail "$who, stdout $where: exit code $code, expected 1"
    grep -q '^error: standard output cannot be written: ' <<< "$said" || fail "$who, stdout $where: does not say so: $said"
  done
  nothing_left "$who"
}
test_output() {
  local driver said code
  for driver in $drivers; do
    [ -x "$bin/$driver" ] && lost "$driver --help" "$bin/$driver" --help
  done
  lost memory_plan "$bin/memory_plan" --model tiny
  lost synthesize "$bin/synthesize" --shape tiny --layers 1 --out m.gguf --quiet
  lost tokenize "$bin/tokenize" --model "$data/nano-Q4_K_M.gguf" --text "def f(x): return x"
  lost generate "$bin/generate" --model "$data/nano-Q4_K_M.gguf" --prompt "def f" --max-tokens 2 --backend reference --quiet
  lost accuracy "${accuracy[@]}" --out -
  printf 'git_sha,utc,gpu,x,y\n1,2,3,4,5\n' > t.csv
  lost plot "$bin/plot" t.csv --out p.svg --x x --y y --series gpu

  # A table that does not take a row: all that fits is there, in whole lines, and the eye sees all of it.
  "$bin/memory_plan" --model tiny --out whole.csv > control.txt || fail "memory_plan: a table that could be written"
  local n_row
  n_row=$(($(wc -l < whole.csv) - 1))
  said=$( (ulimit -f 2 && "$bin/memory_plan" --model tiny --out part.csv) 2>&1 > out.txt)
  [ $? = 1 ] || fail "memory_plan: exit code 0 although rows are lost"
  grep -q "^error: .* of $n_row rows are not in part.csv" <<< "$said" || fail "memory_plan: does not say that rows are lost: $said"
  cmp -s out.txt control.txt || fail "memory_plan: what it prints depends on whether the table could be written"
  whole_lines part.csv
  said=$( (ulimit -f 1 && "${accuracy[@]}" --contexts 6,12,24 --out row.csv) 2>&1 > out.txt) && fail "accuracy: exit code 0 although rows are lost"
  grep -q 'rows are not in row.csv: .*' <<< "$said" || fail "accuracy: does not say that rows are lost: $said"
  grep -q '0-24' out.txt || fail "accuracy: the table was not printed: $(cat out.txt)"
  whole_lines row.csv
  # What can be known before the work is said before it: no room for a header, another header, no lock, no folder.
  refused_first() { # refused_first NAME WORDS FILE
    said=$("${accuracy[@]}" --out "$3" 2>&1 > out.txt) && fail "accuracy: $1: exit code 0"
    grep -q "$2" <<< "$said" || fail "accuracy: $1: found '$said'"
    [ ! -s out.txt ] || fail "accuracy: $1: found out after the work"
  }
  said=$( (ulimit -f 0 && "${accuracy[@]}" --out new/deep/none.csv) 2>&1) && fail "accuracy: exit code 0 without room for a header"
  grep -q 'cannot write in new/deep: File too large' <<< "$said" || fail "accuracy: no room for a header: found '$said'"
  [ -e new ] && fail "accuracy: left a folder for a table that it refused"
  echo another,header > other.csv && refused_first 'another header' 'has another header' other.csv
  refused_first 'a device' 'is not a regular file' /dev/full
  refused_first 'a file in place of a folder' 'cannot create the folder' other.csv/t.csv
  nothing_left 'a refusal'
}

# ---- interrupts

n_interrupted=0 # of all runs: a quick one may end before its signal
interrupted() { # interrupted WHO CHECK COMMAND...: 20 times at a random moment; CHECK is run after each
  local who=$1 check=$2 i code begin span n_ended=0
  shift 2
  begin=$(date +%s%N)
  "$@" > /dev/null 2>&1 || fail "$who: the control run failed"
  span=$((($(date +%s%N) - begin) / 1000000 + 1))
  $check control
  for i in $(seq 20); do
    "$@" > /dev/null 2>&1 &
    sleep "$(awk -v t=$((RANDOM * RANDOM % span)) 'BEGIN {print t / 1000}')"
    kill -s "$([ $((i % 2)) = 0 ] && echo INT || echo TERM)" $! 2> /dev/null
    wait $!
    code=$?
    case $code in
      0) ;;
      130 | 143) n_ended=$((n_ended + 1)) ;;
      *) fail "$who: exit code $code after an interrupt" ;;
    esac
    nothing_left "$who"
    $check interrupted
  done
  n_interrupted=$((n_interrupted + n_ended))
}
check_model() { # a model that is there is the whole model
  if [ "$1" = control ]; then mv m.gguf whole.gguf
  elif [ -e m.gguf ]; then cmp -s m.gguf whole.gguf || fail "synthesize: half a model"; fi
  rm -f m.gguf
}
check_svg() {
  if [ "$1" = control ]; then cp p.svg whole.svg
  elif [ -e p.svg ]; then cmp -s p.svg whole.svg || fail "plot: half a chart"; fi
  rm -f p.svg
}
check_table() {
  [ "$1" != control ] || [ -s new/t.csv ] || fail "no table"
  [ ! -d new ] || [ -e new/t.csv ] || fail "a folder is left with nothing in it"
  whole_lines new/t.csv
  rm -rf new
}
test_interrupts() {
  printf 'git_sha,utc,gpu,x,y\n' > t.csv
  seq 20000 | sed 's/.*/1,2,3,&,&/' >> t.csv
  interrupted synthesize check_model "$bin/synthesize" --shape tiny --out m.gguf --quiet
  interrupted plot check_svg "$bin/plot" t.csv --out p.svg --x x --y y --series gpu
  interrupted memory_plan check_table "$bin/memory_plan" --model 31b --out new/t.csv
  interrupted accuracy check_table "${accuracy[@]}" --out new/t.csv
  [ $n_interrupted -ge 10 ] || fail "$n_interrupted runs were interrupted: nothing was tested"

  # Killed without a word: what it left is named, and gone with the next run; what a live one writes stays.
  local pid said kind
  for kind in KILL STOP; do
    "$bin/synthesize" --shape nano --out m.gguf --quiet > /dev/null &
    pid=$!
    for _ in $(seq 500); do [ -n "$(find . -name "m.gguf.partial-$pid*" -size +1k)" ] && break; sleep 0.01; done
    kill -s $kind $pid
    [ $kind = STOP ] || wait $pid 2> /dev/null
    [ -n "$(find . -name "m.gguf.partial-$pid*")" ] || fail "nothing was left by process $pid: nothing is tested"
    said=$("$bin/synthesize" --shape tiny --layers 1 --out m.gguf --quiet 2>&1 > /dev/null)
    if [ $kind = KILL ]; then
      grep -q "^removed .*m.gguf.partial-$pid.*: left by process $pid" <<< "$said" || fail "what was left is not named: $said"
      nothing_left 'a run after one that was killed'
    else
      [ -z "$said" ] || fail "spoke of a file that is being written: $said"
      [ -n "$(find . -name "m.gguf.partial-$pid*")" ] || fail "removed what process $pid is writing"
      rm -f m.gguf
      kill -s CONT $pid
      while kill -0 $pid 2> /dev/null; do sleep 0.05; done
      [ -s m.gguf ] || fail "the run that had been stopped wrote nothing"
      nothing_left 'a run that had been stopped'
    fi
  done
  # By its name alone, as an older version named it; another host's; a name that is none; somebody's own file.
  sleep 60 & pid=$!
  touch m.gguf.partial-999999999 m.gguf.partial-$pid m.gguf.partial-77-elsewhere m.gguf.partial-x other.gguf.partial-999999999
  said=$("$bin/synthesize" --shape tiny --layers 1 --out m.gguf --quiet 2>&1 > /dev/null)
  kill $pid
  [ ! -e m.gguf.partial-999999999 ] || fail "a dead process' file stays"
  for file in m.gguf.partial-$pid m.gguf.partial-77-elsewhere m.gguf.partial-x other.gguf.partial-999999999; do
    [ -e $file ] || fail "$file was removed"
  done
  grep -q 'left by process 77 of elsewhere, not removed' <<< "$said" || fail "another host's file is not named: $said"
  # A limit of the size of files is an error of the write.
  rm -f ./*.partial-*
  said=$( (ulimit -f 100 && "$bin/synthesize" --shape tiny --out large.gguf --quiet) 2>&1)
  [ $? = 1 ] || fail "synthesize: a limit of the file size: found '$said'"
  grep -q '^error: .*large.gguf.*File too large' <<< "$said" || fail "synthesize: a limit of the file size: found '$said'"
  [ ! -e large.gguf ] || fail "synthesize: half a model"
  nothing_left 'synthesize at a limit'
}

# ---- numbers

refuses() { # refuses OPTION VALUE DRIVER ARGUMENT...
  local said
  if said=$("$bin/$3" "${@:4}" "$1" "$2" 2>&1); then fail "$3 $1 '$2' was taken"
  elif ! grep -q "^error: $1: '.*', need a \(whole \)\?number, \(from\|at least\) " <<< "$said"; then fail "$3 $1 '$2': found '$said'"; fi
}
test_numbers() {
  local value driver
  for value in -1 1e3 1.5 18446744073709551616 ' 5' '5 ' '' 0x10 +1 007 five; do
    refuses --seed "$value" synthesize --shape tiny --layers 1 --out m.gguf --quiet
  done
  for value in 0 18446744073709551615; do
    "$bin/synthesize" --shape tiny --layers 1 --out m.gguf --quiet --seed $value > /dev/null || fail "--seed $value was refused"
  done
  local -A first=([accuracy]=--contexts [throughput]=--context [statistics]=--depths [memory_plan]=--context [breakdown]=--depths
    [ablation]=--depths [draft]=--depths [settings]=--depth [generate]=--context [golden]=--chunk [parity]=--prompt-tokens)
  for driver in "${!first[@]}"; do
    for value in -1 1e3 9223372036854775807 9223372036854775808 99999999999999999999; do
      refuses "${first[$driver]}" "$value" "$driver" --model "$data/nano-Q4_K_M.gguf"
    done
  done
  for value in 0 -1 nan inf 1e999 2e; do refuses --logit-deviation "$value" synthesize --shape tiny --out m.gguf | grep -v "'0' was taken"; done
  status_before=$status
  # Not CLI11's own words, in no driver's help.
  for driver in $drivers; do
    [ -x "$bin/$driver" ] || continue
    "$bin/$driver" --help | grep -nE '9223372036854775807|\[[0-9.e+-]+ - |POSITIVE|NONNEGATIVE' && fail "$driver --help: limits that are no words"
  done
}

# ---- numbers that are none

test_finite() {
  local tensor place said
  "$bin/synthesize" --shape tiny --out good.gguf --quiet > /dev/null || fail "no model"
  judge() { # judge NAME WORDS COMMAND...: refused with WORDS, and no row of the table is ok
    rm -f t.csv
    said=$("${@:3}" 2>&1) && fail "$1: exit code 0: $said"
    grep -q "^error: .*$2" <<< "$said" || fail "$1: expected '$2', found '$said'"
    [ ! -e t.csv ] || ! grep -q ',ok$' t.csv || fail "$1: a row is ok"
  }
  measure() { "$bin/accuracy" --model "$1" --depths 12 --window 4 --chunk 5 --cache bf16,tq4 --quiet --out t.csv; }
  say() { "$bin/generate" --model "$1" --prompt hello --max-tokens 3 --context 64 --backend reference --cache bf16 --quiet; }
  measure good.gguf > /dev/null && [ "$(grep -c ',ok$' t.csv)" = 2 ] || fail "control: accuracy of a model that is finite"
  say good.gguf > /dev/null 2>&1 || fail "control: generate with a model that is finite"
  for tensor in output_norm blk.1.ffn_norm blk.1.attn_q_norm blk.1.ffn_down blk.4.post_ffw_norm; do
    "$spoil" good.gguf bad.gguf $tensor.weight || fail "$tensor was not spoiled"
    case $tensor in
      output_norm) place='position [0-9]* on: it began behind the last layer' ;;
      blk.*) place="position 0 on: it began in layer $(cut -d. -f2 <<< $tensor) " ;;
    esac
    judge "accuracy, $tensor" "$place" measure bad.gguf
    [ -e t.csv ] && grep -q 'failed: not finite' t.csv || fail "accuracy, $tensor: no row that says so"
    judge "generate, $tensor" "$place" say bad.gguf
  done
}

# ---- sessions

test_sessions() { # a text that was read is not read again, by another process, and what follows is the same
  local text=$'def quicksort(items):\n    ' said
  go_on() { # go_on TEXT ARGUMENTS...
    "$bin/generate" --model "$data/nano-Q4_K_M.gguf" --prompt "$text$1" --max-tokens 8 --backend reference --quiet "${@:2}"
  }
  for tail in pivot return 'if len(items)'; do
    go_on "$tail" > "plain $tail.txt" 2> /dev/null || fail "control: generate without a session"
  done
  go_on pivot --session q.session > made.txt 2> err.txt || fail "generate: a session is not made: $(cat err.txt)"
  cmp -s made.txt 'plain pivot.txt' || fail "making a session changes the text"
  cp q.session first.session
  for tail in pivot return 'if len(items)'; do
    go_on "$tail" --session q.session > used.txt 2> err.txt || fail "generate: a session is not used: $(cat err.txt)"
    cmp -s used.txt "plain $tail.txt" || fail "after a session: another text, $(cat used.txt)"
    grep -qE '^q.session: ([0-9]{2}) of [0-9]+ prompt tokens are there' err.txt || fail "does not say what was there: $(cat err.txt)"
    grep -qE '^prompt: [1-5] tokens' err.txt || fail "reads what was there: $(cat err.txt)"
  done
  cmp -s q.session first.session || fail "generate writes a session that it only used"
  # Refused by name, and the file is left alone.
  said=$(go_on pivot --session q.session --cache bf16 2>&1) && fail "another cache format is taken"
  grep -q "its cache is 'tq4', this run's 'bf16'" <<< "$said" || fail "another cache format: $said"
  said=$(go_on pivot --session q.session --seed 3 2>&1) && fail "another seed is taken"
  grep -q 'the seed of its cache' <<< "$said" || fail "another seed: $said"
  printf 'x' | dd of=q.session bs=1 seek=100000 conv=notrunc 2> /dev/null
  said=$(go_on pivot --session q.session 2>&1) && fail "a damaged file is taken"
  grep -q "tensor 'layer.*checksum .*damaged" <<< "$said" || fail "a damaged file: $said"
  # A disk that fills up: what was there stays, and nothing beside it.
  said=$( (ulimit -f 64 && go_on pivot --session new.session) 2>&1) && fail "generate: exit code 0 although its session is lost"
  grep -q 'new.session.*File too large' <<< "$said" || fail "a full disk: $said"
  [ -e new.session ] && fail "half a session is there"
  nothing_left 'generate --session'
  sessions_of_tables
}

cells() { # cells FILE COLUMN...: those columns of every row
  awk -v want="${*:2}" 'BEGIN {FPAT = "([^,]*)|(\"([^\"]|\"\")*\")"; n = split(want, name, " ")}
    {line = $0; while (match(line, /"([^"]|"")*"/)) line = substr(line, 1, RSTART - 1) "q" substr(line, RSTART + RLENGTH)
     split(line, cell, ",")}
    NR == 1 {for (i in cell) at[cell[i]] = i; next}
    {out = ""; for (i = 1; i <= n; i++) {if (!(name[i] in at)) {print "no column " name[i]; exit 1} out = out " " cell[at[name[i]]]}; print out}' "$1"
}
flip() { # flip FILE: a byte of its largest tensors
  local at=$(($(stat -c %s "$1") * 2 / 3))
  printf "\\x$(printf %02x $((255 - $(od -An -tu1 -j $at -N 1 "$1"))))" | dd of="$1" bs=1 seek=$at conv=notrunc 2> /dev/null
}
# The same table without a file, with one that is made, and with one that is used; and what is refused, by WORDS.
same_tables() { # same_tables NAME COLUMNS FILE COMMAND...
  local name=$1 columns=$2 file=$3 made before
  rm -f ./*.csv
  "${@:4}" --quiet --out plain.csv > /dev/null || fail "$name: control"
  "${@:4}" --quiet --out made.csv --session t.session > /dev/null || fail "$name: a session is not made"
  [ -s "$file" ] || fail "$name: there is no $file"
  before=$(cksum "$file")
  "${@:4}" --quiet --out used.csv --session t.session > /dev/null || fail "$name: a session is not used"
  [ "$before" = "$(cksum "$file")" ] || fail "$name: writes a session that it only used"
  # shellcheck disable=SC2086
  for made in made used; do
    [ "$(cells plain.csv $columns)" = "$(cells $made.csv $columns)" ] ||
      fail "$name: another table with a session $made: $(cells plain.csv $columns) and $(cells $made.csv $columns)"
  done
  [ -n "$(cells plain.csv $columns)" ] || fail "$name: nothing was compared"
  cp "$file" whole.session && flip "$file"
  refused "$name, a damaged file" 'checksum .*damaged' "${@:4}" --session t.session
  mv whole.session "$file"
}
refused() { # refused NAME WORDS COMMAND...
  local said
  said=$("${@:3}" --quiet --out - 2>&1) && fail "$1 is taken"
  grep -q "^error: .*$2" <<< "$said" || fail "$1: $said"
}
sessions_of_tables() {
  local model=(--model "$data/nano-Q4_K_M.gguf" --ids "$data/heldout-ids.u16") columns run
  columns='cache range nll kl_mean kl_max cosine status'
  run=("$bin/accuracy" "${model[@]}" --window 4 --cache "tq4,bf16@chunk=7")
  same_tables 'accuracy --depths' "$columns" t.session.tq4 "${run[@]}" --depths 56,72 --chunk 24
  [ -s t.session.bf16 ] && [ -s t.session.bf16@chunk=7 ] || fail "accuracy: not a file a case: $(echo t.session*)"
  refused 'a longer prefix' 'holds 48 tokens, and this run looks at positions from 24' "${run[@]}" --depths 40 --chunk 24 --session t.session
  refused 'another text' 'holds another text' "$bin/accuracy" "${model[@]:0:2}" --depths 56 --window 4 --chunk 24 --cache tq4 --session t.session
  refused 'all positions' 'nothing in front' "${accuracy[@]}" --session t.session
  refused 'the first chunk' 'nothing in front' "${run[@]}" --depths 56 --chunk 56 --session t.session
  refused 'two prompts' 'one text, --prompts is 2' "$bin/accuracy" "${model[@]}" --trajectory 5 --prompts 2 --session t.session
  refused 'recall' 'asks all along' "$bin/accuracy" "${model[@]}" --recall "$data/recall-public-8192.gguf" --session t.session
  rm -f t.session*
  same_tables 'accuracy --trajectory' 'cache range first_difference agreement status' t.session.tq4 "$bin/accuracy" \
    "${model[@]}" --trajectory 5 --prompts 1 --prompt-len 60 --chunk 24 --cache tq4,sim-int8
  rm -f t.session*
  run=("$bin/draft" "${model[@]}" --depths 40,160 --sites 1 --window 6 --drafts 3 --chunk 24)
  same_tables 'draft' 'n_depth n_draft tokens_a_step n_step same_text status' t.session "${run[@]}" --cache tq4
  refused 'two caches' 'needs one --cache' "${run[@]}" --cache tq4,bf16 --session t.session
  rm -f t.session*
  run=("$bin/settings" "${model[@]}" --chunk 24 --cache tq4)
  same_tables 'settings' 'setting n_gen tokens_a_step n_same text_digest status' t.session "${run[@]}" --depth 60 --window 20
  [ "$(cells plain.csv n_read status | sort | uniq -c | xargs)" = '10 60 ok' ] || fail "settings: $(cells plain.csv n_read status)"
  [ "$(cells used.csv n_read | sort -u | xargs)" = 0 ] || fail "settings reads what was there: $(cells used.csv n_read)"
  [ "$(cells plain.csv text_digest | sort -u | wc -l)" -gt 3 ] || fail "settings: all wrote the same: $(cells plain.csv text_digest)"
  [ "$(cells plain.csv setting n_same | grep -cE '^ (greedy|draft=.*) 20$')" = 6 ] || fail "settings: drafts changed the text"
  # A setting's text hangs on none that came before it.
  "${run[@]}" --depth 60 --window 20 --settings temperature=1+top-k=40,draft=3,temperature=0.7 --quiet --out other.csv > /dev/null || fail "settings: in another order"
  [ "$(cells other.csv setting text_digest | sort)" = "$(cells plain.csv setting text_digest | grep -E '^ (temperature=1\+top-k=40|draft=3|temperature=0.7) ' | sort)" ] ||
    fail "settings: in another order other texts: $(cells other.csv setting text_digest)"
  # Longer than can be taken back: each begins from the file, and the first tokens are those of before.
  refused 'a long window' 'give a --session' "${run[@]}" --window 70
  "${run[@]}" --depth 60 --window 70 --settings greedy,draft=3,temperature=1 --quiet --out long.csv --session t.session > /dev/null || fail "settings: a long window"
  [ "$(cells long.csv setting n_same | head -n 2 | xargs)" = 'greedy 70 draft=3 70' ] || fail "settings, a long window: $(cells long.csv setting n_same)"
  refused 'a depth behind the file' 'holds 60 tokens, --depth is 50' "${run[@]}" --depth 50 --session t.session
  refused 'switches of the reference' "switches are a device's" "${run[@]}" --settings greedy,off=graph
  refused 'a setting that is none' "'hot' is not understood" "${run[@]}" --settings hot
  nothing_left 'a table with a session'
}

test_"$part"
[ $status = 0 ] && echo "drivers, $part: in order"
exit $status

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the drivers make of files as people have them, and what they say of it on stderr.
# Usage: published_files_test.sh BIN PUBLISHED_CASES
set -uo pipefail
bin=$(realpath "$1") cases=$(realpath "$2")
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
"$cases" "$scratch" || { echo "published_cases failed"; exit 1; }
cd "$scratch" || exit 1
status=0
fail() { echo "$*" && status=1; }
run() { # run NAME ARGUMENT...: rc, out and err
  err=$("$bin/$1" "${@:2}" 2>&1 >out) && rc=0 || rc=$?
  err=$(tr -d '\000' <<<"$err")
}
refuses() { # refuses TEXT DRIVER ARGUMENT...
  run "${@:2}"
  [ $rc -ne 0 ] || fail "$2 ${*:3}: exit code 0, expected a refusal with '$1'"
  grep -qF -- "$1" <<<"$err" || fail "$2 ${*:3}: expected '$1', found: $err"
}
takes() { # takes TEXT DRIVER ARGUMENT...: exit code 0, and on stderr the text; none for an empty one
  run "${@:2}"
  [ $rc -eq 0 ] || fail "$2 ${*:3}: exit code $rc: $err"
  if [ -z "$1" ]; then
    ! grep -q '^note:' <<<"$err" || fail "$2 ${*:3}: a note where there is nothing to say: $err"
  else
    [ "$(grep -cF -- "$1" <<<"$err")" -eq 1 ] || fail "$2 ${*:3}: expected '$1' once, found: $err"
  fi
}
generate() { echo "generate --quiet --prompt hello --max-tokens 6 --temperature 0 --model $1"; }
statistics() { echo "statistics --quiet --depths 40 --window 8 --out - --model $1"; }
accuracy() { echo "accuracy --quiet --depths 40 --window 8 --out - --model $1"; }
plan() { echo "memory_plan --model $1"; }
tokenize() { echo "tokenize --text hello --ids --model $1"; }

for use in generate statistics accuracy plan tokenize; do
  # shellcheck disable=SC2046
  {
    takes '' $($use micro.gguf)
    refuses "tensor 'output_norm.weight' is missing among its 2 tensors" $($use only_embedding.gguf)
    refuses 'this is a clip file, not a text model' $($use mmproj.gguf)
    refuses 'this is an adapter file, not a text model' $($use adapter.gguf)
    refuses 'this is an imatrix file, not a text model' $($use imatrix.gguf)
    refuses 'is part 2 of 2: name the first' $($use split-00002-of-00002.gguf)
    refuses 'part 2 of 2 is missing' $($use alone-00001-of-00002.gguf)
    refuses 'swapped or renamed' $($use swapped-00001-of-00002.gguf)
    takes '' $($use split-00001-of-00002.gguf)
    takes '' $($use output_untied.gguf)
    [ $use = tokenize ] || takes 'left out 1 tensors' $($use vision_tensors.gguf)
    [ $use = tokenize ] || takes 'the tokenizer has 300 tokens, the embedding 320 rows' $($use vocab_shorter.gguf)
  }
done

takes 'add_bos_token is false' $(generate add_bos_false.gguf)
takes 'add_bos_token is false' $(tokenize add_bos_false.gguf)
cp out told && run $(tokenize micro.gguf)
cmp -s out told || fail "tokenize: add_bos_token = false changes the tokens: $(cat told), expected $(cat out)"
run $(generate micro.gguf) && cp out told && run $(generate split-00001-of-00002.gguf)
cmp -s out told || fail 'generate: a split file does not run as the whole one does'

takes '' memory_plan --model micro.bin
takes '' memory_plan --model micro.gguf --context 4096
refuses '--context 4097: the model was trained for 4096 positions' memory_plan --model micro.gguf --context 4097
refuses '--context 262145: the model was trained for 262144 positions' memory_plan --model 12b --context 262145

takes '' accuracy --quiet --out - --model micro.gguf --recall recall.gguf
refuses "question 0, column 0 of 'answer': padding (-1)" accuracy --out - --model micro.gguf --recall recall_pad_first.gguf
refuses "question 0, column 1 of 'answer': id 320 is outside" accuracy --out - --model micro.gguf --recall recall_outside.gguf

cat >micro.json <<'EOF'
{"vocab": 320, "hidden": 256, "ffn_hidden": 256, "n_head": 4, "is_sliding": [1, 0], "window": 32, "context": 4096,
 "sliding": {"head_dim": 64, "n_head_kv": 1}, "full": {"head_dim": 128, "n_head_kv": 1}}
EOF
run synthesize --quiet --shape micro.json --out parts.gguf --split-max-size 200K
[ $rc -eq 0 ] && grep -q '4 parts' out || fail "synthesize --split-max-size: $(cat out) $err"
takes '' memory_plan --model "$(ls parts-00001-of-*.gguf)"
for size in 0 -1 5X 1.5G 99999999999G ''; do
  run synthesize --quiet --shape micro.json --out bad.gguf --split-max-size "$size"
  [ $rc -ne 0 ] || fail "synthesize --split-max-size '$size': taken"
  ! ls bad* >/dev/null 2>&1 || fail "synthesize --split-max-size '$size': left something behind"
done
exit $status

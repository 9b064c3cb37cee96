#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# .ci/pages is code under test: it writes the tables of a little tree, finds nothing to say of it then, and finds each
# planted fault by page and line, with a build of plot and without. Usage: pages_test.sh SCRATCH_DIR BIN
set -euo pipefail
ci=$(cd "$(dirname "$0")/../../.ci" && pwd)
scratch=${1:?usage: pages_test.sh SCRATCH_DIR BIN}
bin=$(cd "${2:?usage: pages_test.sh SCRATCH_DIR BIN}" && pwd)
tree=$scratch/tree
n_passed=0 n_failed=0

clean_tree() {
  rm -rf "$scratch"
  mkdir -p "$tree/results/rates" "$tree/include/gemma4/report" "$tree/experiments"
  for source in experiments/plot.cpp include/gemma4/report/{markdown_tables,table_query,csv_table}.hpp; do
    touch -d 2000-01-01 "$tree/$source"
  done
  printf 'git_sha,utc,gpu,cache,rate\n0123456789,2026-01-01,GPU,tq4,172.54\n' > "$tree/results/rates/a.csv"
  printf '# Title\n\nNo figure; `0.5`, CMake 3.25 and [this](0.5.md) are none.\n' > "$tree/README.md"
  printf '## `rates`\n<!-- files: rates -->\n<!-- end -->\n' > "$tree/results/FILES.md"
  printf 'kShape = {{"cache"}, {"rate"}};\n' > "$tree/experiments/rates.cpp"
  printf 'kRunColumns = {"git_sha", "utc", "gpu"}\n' > "$tree/include/gemma4/report/result_table.hpp"
  cat > "$tree/results/README.md" <<'PAGE'
# Results
<!-- table: rates
rows: cache
column: rate | rate | %.1f
-->
<!-- end -->
PAGE
  "$ci/pages" "$tree" "$bin" > /dev/null
}
judge() { # judge NAME OUTCOME
  if [ "$2" = ok ]; then n_passed=$((n_passed + 1)); else n_failed=$((n_failed + 1)); echo "FAILED: $1"; fi
}
finds() { # finds WORDS [nobuild]: the check fails on the tree as it is, and says WORDS
  local said arguments=("$tree" "$bin")
  [ -z "${2:-}" ] || arguments=("$tree")
  if said=$("$ci/pages" --check "${arguments[@]}" 2>&1); then judge "not found: $1" no
  elif grep -qF -- "$1" <<<"$said"; then judge "$1" ok
  else judge "found something else than '$1': $said" no; fi
  clean_tree
}
passes() { # passes NAME WORDS: without BIN
  local said
  if said=$("$ci/pages" --check "$tree" 2>&1) && grep -qF -- "$2" <<<"$said"; then judge "$1" ok
  else judge "$1: $said" no; fi
}

clean_tree
grep -qF '| tq4 | 172.5 |' "$tree/results/README.md" && judge written ok || judge 'the table is not written' no
passes 'without a build the rest is checked' 'tables not compared'
mkdir -p "$tree/build/bin" && ln -s "$bin/plot" "$tree/build/bin/plot"
passes 'a page as written is refused' 'pages: in order'
"$ci/pages" --check "$tree" | grep -q 'not compared' && judge 'the build of the tree is not used' no
touch -d 2100-01-01 "$tree/include/gemma4/report/table_query.hpp"
passes 'an old build does not judge' 'tables not compared'
clean_tree
if "$ci/pages" --check "$tree" "$scratch" >/dev/null 2>&1; then judge 'a build that is not there judges' no; fi

sed -i 's/172.54/180.04/' "$tree/results/rates/a.csv";                     finds 'results/README.md:8: found'
sed -i 's/| 172.5 |/| 180.0 |/' "$tree/results/README.md";                 finds 'results/README.md:8: found'
sed -i 's/rows: cache/rows: cash/' "$tree/results/README.md";              finds 'results/README.md:2: '
sed -i '/<!-- end -->/d' "$tree/results/README.md";                        finds 'results/README.md:2: '
printf 'git_sha,utc,gpu,cache,rate\n12,2026-01-02,GPU,tq4,9\n' > "$tree/results/rates/b.csv"
finds '| tq4 | 9.0 |'
echo 'It does 172.5 of them.' >> "$tree/results/README.md";                finds 'results/README.md:12: It does' nobuild
echo 'That is 12 % more.' >> "$tree/README.md";                            finds 'README.md:4: That is' nobuild
echo '| typed | 2.5 |' >> "$tree/results/FILES.md";                        finds 'results/FILES.md:7: | typed' nobuild
echo 'It takes 5 ms.' >> "$tree/results/README.md";                        finds 'results/README.md:12: It takes' nobuild
mkdir "$tree/results/more" && cp "$tree"/results/rates/a.csv "$tree/results/more"
finds 'results/FILES.md: no heading for results/more' nobuild
mkdir "$tree/results/more" && cp "$tree"/results/rates/a.csv "$tree/results/more" && echo '## `more`' >> "$tree/results/FILES.md"
finds "'<!-- files:' does not list results/more" nobuild
# Columns that the driver does not write, wherever a query names them; `if there:` is for those of other drivers.
for line in 'where: speed=1' 'rows: cache, speed' 'column: a | speed | %.1f' 'column: a | rate | %.1f | speed=2, cache=tq4' \
  'column: a | rate | %.1f | minus speed=2' 'column: a | rate | %.1f | times 2 | over cache=a, speed>2'; do
  sed -i "s/^rows: cache/&\n$line/" "$tree/results/README.md"
  finds "results/README.md:4: 'speed' is no column that experiments/rates.cpp writes" nobuild
done
sed -i 's/^rows: cache/&\nif there: speed=1/' "$tree/results/README.md"
passes 'a column of other drivers is refused' 'tables not compared'
clean_tree

rm -rf "$scratch"
echo "pages: $n_passed passed, $n_failed failed"
[ $n_failed = 0 ]

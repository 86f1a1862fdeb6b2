#!/bin/sh
# runs every test program named on the command line and closes with "N passed, N failed, N skipped"; exit 1 when any failed
export OMP_WAIT_POLICY=passive # small tests on a busy machine: threads that wait should sleep
passed=0 failed=0 skipped=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for program in "$@"; do
    start=$(date +%s)
    "$program" >"$log" 2>&1
    code=$?
    p=$(grep -c '^\[       OK \]' "$log")
    f=$(grep -c '^\[  FAILED  \] [A-Za-z_]' "$log")
    s=$(grep -c '^\[  SKIPPED \] [A-Za-z_]' "$log")
    # cmocka names each failed and skipped test a second time in its summary
    grep -q 'FAILED TEST(S)' "$log" && f=$((f / 2))
    grep -q 'SKIPPED TEST(S)\|skipped test(s)' "$log" && [ "$s" -gt 1 ] && s=$((s / 2))
    if [ "$code" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-28s %3d passed %3d failed %3d skipped  %3d s\n' "$(basename "$program")" "$p" "$f" "$s" $(($(date +%s) - start))
    if [ "$code" -ne 0 ]; then cat "$log"; else grep '^skipped:' "$log" | sort -u; fi
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" -eq 0 ]

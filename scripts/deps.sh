#!/bin/sh
# make deps: installs what the build and the tests need and is not there yet. Prints nothing and does nothing when all is.
# Non-interactive; sudo only when not root; without either, prints the command to run.
set -eu

# what is missing? the compiler, pkg-config, each library by its pkg-config name
missing=""
for tool in gcc pkg-config; do command -v $tool >/dev/null 2>&1 || missing="$missing $tool"; done
for library in libpcre2-8 libcjson cmocka; do
    pkg-config --exists $library 2>/dev/null || missing="$missing $library"
done
[ -n "$missing" ] || exit 0
echo "make deps: missing:$missing" >&2

if command -v apt-get >/dev/null 2>&1; then
    update="apt-get update -q"
    install="apt-get install -y -q --no-install-recommends gcc libc6-dev libgomp1 pkg-config libpcre2-dev libcjson-dev libcmocka-dev"
elif command -v dnf >/dev/null 2>&1; then
    update="true"
    install="dnf install -y gcc glibc-devel libgomp pkgconf-pkg-config pcre2-devel cjson-devel libcmocka-devel"
elif command -v brew >/dev/null 2>&1; then
    exec brew install gcc pkg-config pcre2 cjson cmocka
else
    echo "error: no apt-get, dnf or brew here: install a C compiler, pkg-config, PCRE2, cJSON and cmocka by hand" >&2
    exit 1
fi

if [ "$(id -u)" = 0 ]; then
    as=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as="sudo"
else
    echo "error: not root, and sudo asks for a password. Run: sudo sh -c '$update && $install'" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
$as $update >&2 || echo "make deps: the package list could not be refreshed; trying with the one that is here" >&2
$as $install >&2

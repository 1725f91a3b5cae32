#!/usr/bin/env bash
# test.sh: grades a kv-store against its contract (README.md), with bash, curl and jq.
#
# usage: ./test.sh            in containers if a Docker engine answers, else with processes on this machine
#        ./test.sh docker     in containers, on a network of their own
#        ./test.sh local      with processes of target/release/kv-store. Both: further words are the tests to run, of
#                             those at the end of this file; some continue with what others began
#        ./test.sh bench      measures instead of testing, in five minutes: needs wrk and nginx, and compares with Redis
#                             and etcd where they are installed; see README.md, "Speed"
#        ./test.sh sanitize   runs processes built with AddressSanitizer under mixed load, for five minutes or what
#                             SANITIZE_SECONDS says: needs python3
#        ./test.sh grade IMAGE [SECTION...]
#                             grades any image, as a black box in containers. Sections: single forwarding shards
#                             replicas; without any, all of them. Options, before or after IMAGE:
#          --port N           the port that the image serves, which is also given to it as PORT (8080)
#          --prefix /PATH     what all paths begin with (/kv-store)
#          --vocabulary V     form or json: what `single` and `forwarding` are asked in (found out by asking the image)
#          --tap, --json      prints TAP version 13, or one JSON object as Gradescope takes it
#          --start S          for an instance to come up, in seconds (60)
#          --timeout S        for each request, in seconds (10)
#          --limit S          for everything, in seconds (600); what has not been asked then has failed
#
# Builds what it tests, starts what it needs and removes it again. Prints a line a check, and at the end
# "N passed, N failed"; exit status 1 if any failed, 2 if nothing could be graded. Can run several times at once.
#
# What the grader asks is part of the tests. There answers are compared byte for byte. The grader compares JSON, with
# members in any order and more of them than expected, and counts the same mistake once.
set -u -o pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")" || exit 2
export LC_ALL=C
unset PORT IP FORWARDING_ADDRESS MAINIP ADDRESS VIEW REPL_FACTOR SECRET

VERSION=$(sed -n '0,/^version = /s/^version = "\(.*\)"/\1/p' Cargo.toml)
readonly LIMIT=1048576 SETTLES_WITHIN=10   # bytes of a value; seconds after which replicas agree
name=kv-test-$$-$RANDOM
strict=true                                # false: the grader
where=process                              # or container
binary=target/release/kv-store image=kv-store:test
served=8080 prefix=/kv-store               # the port of containers, and what paths begin with
style=text                                 # or tap or json
comes_up_within=60 patience=40 limit=86400 # seconds for a start, for one request, and for all
section='' hopeless=''                     # what checks are named after; why nothing can be asked any more in it
settled=0                                  # the second at which all nodes should know what happened last
passed=0 failed=0 unmade=0 skipped=0       # checks; those that could not be made; those of this section
reported=0                                 # lines
# Of an instance: where curl reaches it; where other instances do, host:port; the process or container; its variables;
# the address of its container.
declare -A url=() address=() process=() settings=() ip=()

# ---- Instances: the same verbs for processes and for containers ------------------------------------------------------

build_process() { cargo build --release --locked; }
build_container() { docker build -q -t "$image" . && make_network; }

place_process() { # INSTANCE: fixes where others reach an instance, before it runs
  local port
  while port=$((20000 + RANDOM % 12000)) && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  address[$1]=127.0.0.1:$port
}
place_container() { # Our own nodes have names. The assignments give nodes fixed IP addresses.
  ip[$1]=${network%.*}.$((${network##*.} + 2 + ${#ip[@]})) # the network's first address is the host's
  address[$1]=${ip[$1]}:$served
  if "$strict"; then address[$1]=$name-$1:$served; fi
}
launch_process() { # INSTANCE: starts an instance with its settings. One that ran before starts blank.
  # shellcheck disable=SC2086 # settings are words
  env IP=127.0.0.1 PORT="${address[$1]#*:}" ${settings[$1]} "$binary" 2>>"$work/$1.log" &
  process[$1]=$!
  url[$1]=http://${address[$1]}
}
launch_container() {
  local variables=() variable
  "$strict" || variables=(-e "PORT=$served")
  for variable in ${settings[$1]}; do variables+=(-e "$variable"); done
  process[$1]=$name-$1
  engine rm -f -v "${process[$1]}"
  variables+=(--network "$name" --ip "${ip[$1]}" -p "127.0.0.1::$served")
  engine run -d --name "${process[$1]}" "${variables[@]}" "$image" || return
  find_port "$1" || true # one that has ended at once has none
}
# engine ARGUMENT...: docker, which does not hang. (Ctrl-C does not reach it, or a container would come up after it.)
engine() { timeout "$(left 60)" docker "$@" </dev/null 2>"$work/error"; }
# A container that has been started again, or is in another network, has another port.
find_port() { url[$1]=http://$(engine port "${process[$1]}" "$served/tcp" | head -n 1); }

kill_process() {
  disown "${process[$1]}" # or bash would report its end
  kill -KILL "${process[$1]}"
  while kill -0 "${process[$1]}" 2>/dev/null; do sleep 0.01; done
}
kill_container() { engine kill "${process[$1]}"; }
# (The signal is sent when kill returns, and has arrived some time later.)
pause_process() { kill -STOP "${process[$1]}" && poll 60 grep -q '^State:.T' "/proc/${process[$1]}/status"; }
pause_container() { engine pause "${process[$1]}"; }
resume_process() { kill -CONT "${process[$1]}"; }
resume_container() { engine unpause "${process[$1]}"; }
stop_process() { # INSTANCE: asks it to end; its exit status is in $ended
  kill -TERM "${process[$1]}"
  wait "${process[$1]}"
  ended=$?
}
stop_container() {
  engine stop -t 5 "${process[$1]}" && ended=$(engine inspect -f '{{.State.ExitCode}}' "${process[$1]}")
}
cut_container() { # INSTANCE: cuts it off from the others. We still reach it, over Docker's own network.
  engine network connect bridge "${process[$1]}" && engine network disconnect "$name" "${process[$1]}" && find_port "$1"
}
heal_container() {
  engine network connect --ip "${ip[$1]}" "$name" "${process[$1]}" &&
    engine network disconnect bridge "${process[$1]}" && find_port "$1"
}

# end_of_process INSTANCE: prints how it has ended, if it has.
end_of_process() { kill -0 "${process[$1]}" 2>/dev/null || echo "an error"; }
end_of_container() { engine inspect -f '{{if not .State.Running}}status {{.State.ExitCode}}{{end}}' "${process[$1]}"; }
log_process() { cat "$work/$1.log"; }
log_container() { timeout 60 docker logs "${process[$1]}" 2>&1; }
pid_process() { echo "${process[$1]}"; }
pid_container() { engine inspect -f '{{.State.Pid}}' "${process[$1]}"; }
# run_process "VARIABLE=VALUE..." [ARGUMENT...]: runs the program to its end; prints its output and its exit status.
# shellcheck disable=SC2086 # settings are words
run_process() { timeout 60 env $1 "$binary" "${@:2}" 2>&1; echo "status $?"; }
run_container() {
  # shellcheck disable=SC2046,SC2086
  timeout 60 docker run --rm $([ -z "$1" ] || printf -- '-e %s ' $1) "$image" "${@:2}" 2>&1; echo "status $?"
}
# health_process INSTANCE: what its health check says.
health_process() { run_process "IP=127.0.0.1 PORT=${address[$1]#*:} ${settings[$1]}" --health | tail -n 1; }
health_container() { engine exec "${process[$1]}" /kv-store --health >/dev/null; echo "status $?"; }

remove_containers() { docker ps -aq --filter "name=^$name-" | xargs -r timeout 60 docker rm -f -v >/dev/null 2>&1; }
clean() {
  local signal
  trap '' EXIT INT TERM HUP
  for signal in TERM CONT KILL; do jobs -p | xargs -r kill "-$signal"; done 2>/dev/null
  if [ "$where" = container ]; then
    remove_containers
    docker network ls -q --filter "name=^$name$" | xargs -r docker network rm
    docker images -q "$name-server" | sort -u | xargs -r docker rmi -f
  fi >/dev/null 2>&1
  rm -rf "$work"
}
# make_network: Docker lets us choose addresses only in a subnet that was given by name: the one that it has just found
# to be free. Another run may be quicker. $network is its first address.
make_network() {
  local subnet
  for _ in {1..5}; do
    engine network create "$name" >/dev/null || return
    subnet=$(engine network inspect -f '{{(index .IPAM.Config 0).Subnet}}' "$name")
    network=${subnet%/*}
    engine network rm "$name" >/dev/null
    ! engine network create --subnet "$subnet" "$name" >/dev/null || return 0
  done
  return 1
}

act() { # VERB INSTANCE: launch, kill, pause, resume, stop, cut or heal
  given_up || "$1_$where" "$2" >/dev/null || hopeless="no way to $1 $2: $(tail -n 1 "$work/error")"
  settle
}
# settle: something has happened that nodes take time to find out.
settle() { settled=$((SECONDS + SETTLES_WITHIN)); }
place() { # INSTANCE...
  local instance
  for instance in "$@"; do [ -n "${address[$instance]:-}" ] || "place_$where" "$instance"; done
}
start() { # INSTANCE [VARIABLE=VALUE...]: starts an instance with these settings, and waits until it answers
  place "$1"
  settings[$1]="${*:2}"
  restart "$1"
}
start_node() { place "$1" && start "$1" ADDRESS="${address[$1]}" "${@:2}"; } # NODE [VARIABLE=VALUE...]
restart() { # INSTANCE...: starts instances with the settings that they have
  local instance
  for instance in "$@"; do act launch "$instance"; done
  for instance in "$@"; do
    given_up || poll "$comes_up_within" has_come_up "$instance" || given_up || hopeless=$(why_not_up "$instance")
  done
  settle
}
start_store() { # "NODE..." [VARIABLE=VALUE...]: starts the nodes of a first view
  local node nodes
  read -r -a nodes <<<"$1"
  place "${nodes[@]}"
  for node in "${nodes[@]}"; do settings[$node]="ADDRESS=${address[$node]} VIEW=$(view "${nodes[@]}") ${*:2}"; done
  restart "${nodes[@]}"
}
has_come_up() { # INSTANCE: any answer will do. One that has ended will not come up.
  [ -z "$("end_of_$where" "$1")" ] || { hopeless=$(why_not_up "$1") && return; }
  curl -s -o /dev/null -m 2 "${url[$1]}$prefix" || curl -s -o /dev/null -m 2 "${url[$1]}$prefix/none"
}
why_not_up() { # INSTANCE
  local end port=${address[$1]##*:}
  end=$("end_of_$where" "$1")
  curl -s -o /dev/null -m 2 "${url[$1]}$prefix"
  case $?,$end in
    *,?*) echo "$1 ended with $end before it answered" ;;
    7,* | 52,* | 56,*)
      echo "$1 runs, but its port $port is still closed after $comes_up_within s (does it listen there, on 0.0.0.0?)"
      ;;
    *) echo "$1 runs and its port $port is open, but gave no HTTP answer within $comes_up_within s" ;;
  esac
  last_lines "$1"
}
last_lines() { # INSTANCE
  local lines
  lines=$("log_$where" "$1" | tail -n 5 | plain | cut -c 1-300)
  printf "last lines of %s's log:\n%s\n" "$1" "$(indent '  ' "${lines:-(there are none)}")"
}

given_up() { # whether nothing can be asked any more
  [ "$SECONDS" -lt "$limit" ] || hopeless="the time in all is over, $limit s (--limit)"
  [ -n "$hopeless" ]
}
left() { echo $((SECONDS >= limit ? 1 : limit - SECONDS < $1 ? limit - SECONDS : $1)); } # MOST: seconds
poll() { # SECONDS COMMAND...: again and again, until the command succeeds or the time is over
  local deadline=$((SECONDS + $1))
  until "${@:2}"; do
    [ "$SECONDS" -lt "$deadline" ] && ! given_up || return
    sleep 0.05
  done
}
# at_once COUNT COMMAND...: runs so many of it at once, each with its number as last argument; output: what they print.
at_once() {
  local n jobs=()
  rm -f "$work"/at_once.*
  for ((n = 1; n <= $1; n++)); do
    "${@:2}" "$n" >"$work/at_once.$n" 2>/dev/null &
    jobs+=($!)
  done
  wait "${jobs[@]}"
}
output() { cat "$work"/at_once.*; }
# all_along COMMAND...: runs it in the background, again and again, with the number of the round as last argument, until
# `enough` is called. What it prints is in $work/along.
all_along() {
  rm -f "$work/enough"
  (for n in {1..2000}; do [ -e "$work/enough" ] || "$@" "$n"; done) >"$work/along" &
  along=$!
}
enough() { touch "$work/enough" && wait "$along"; }
# status_field INSTANCE FIELD: what the kernel says of it: VmHWM (the most memory it ever had, in KiB), Threads.
status_field() { awk -v field="$2:" '$1 == field { print $2 }' "/proc/$("pid_$where" "$1")/status"; }
now() { echo $(($(date +%s%N) / 1000000)); }              # milliseconds since some moment
letters() { head -c "$1" /dev/zero | tr '\0' "${2:-v}"; } # COUNT [LETTER]

# ---- Questions -------------------------------------------------------------------------------------------------------

readonly -a json=(-H 'Content-Type: application/json')

# ask INSTANCE VERB PATH [CURL ARGUMENT...]: prints a line "STATUS TYPE BODY" for each answer; the type is left out if
# it is JSON, or where we are not strict. A path that does not begin with a slash is one below /kv-store/. One like
# keys/a[1-9] is nine requests; one that is not answered is the last.
ask() {
  local seconds path=$3 written='%{http_code}' request
  given_up && return
  seconds=$(left "$patience")
  if "$strict"; then written+=' %{content_type}'; fi
  [[ $path = /* ]] || path=/kv-store/$path
  request=(-m "$seconds" -X "$2" "${url[$1]}${path/#\/kv-store/$prefix}" "${@:4}")
  if [[ $3 =~ ^(keys/|view-change$) && " ${*:4}" == *' -d'* && $* != *Content-Type* ]]; then request+=("${json[@]}"); fi
  echo "curl ${request[*]@Q}" >>"$work/sent" # which can be pasted
  timeout --foreground "$(left 99999)" curl -s -S --fail-early -w $'\n\x1e'"$written"$'\n' "${request[@]}" \
    2>"$work/error" | tr -d '\0' | awk '
      !/^\036/ { body = body (parts++ ? " " : "") $0; next }
      { sub(/ $/, "", body); sub(/ application\/json$/, "") }
      !/^\036000/ { print substr($0, 2) " " body }
      { parts = 0; body = "" }'
  case ${PIPESTATUS[0]} in
    0) ;;
    28 | 124) echo "no answer within $seconds s" ;;
    7) echo "no answer: connection refused" ;;
    52 | 56) echo "no answer: the connection was closed" ;;
    *) echo "no answer: $(head -n 1 "$work/error")" ;;
  esac
}
# timed INSTANCE PATH: prints the status of each answer, and how many seconds it took.
timed() { curl -s -m 40 -H Connection:close -o /dev/null -w '%{http_code} %{time_total}\n' "${url[$1]}/kv-store/$2"; }
code() { sed -E 's/^([0-9]{3}) .*/\1/'; } # the statuses of answers
status_of() { ask "$@" | code; }
body() { cut -c 5-; }                              # of answers that are JSON
member() { body | jq -r -c "$1" 2>/dev/null; }     # FILTER: of such answers

connect() { # INSTANCE: opens a connection; its descriptor is in $fd
  local host=${url[$1]#http://}
  exec {fd}<>"/dev/tcp/${host%:*}/${host#*:}"
}
# exchange INSTANCE: sends what it reads; prints what comes back until the server closes the connection, or STILL OPEN.
exchange() {
  local fd
  connect "$1"
  cat <&0 >&"$fd" 2>/dev/null &
  timeout 60 cat <&"$fd" || echo "STILL OPEN"
  exec {fd}>&-
  { disown $! && kill $!; } 2>/dev/null # a writer may wait for a reset that does not come
}
# raw INSTANCE BYTES: exchanges bytes (in the form of printf's %b) as they are, but that each request gets a host (to
# leave it out, write HTTP/1.\x31).
raw() { printf '%b' "${2//HTTP\/1.1\\r\\n/HTTP/1.1\\r\\nHost: test\\r\\n}" | exchange "$1"; }
# gets COUNT PATH: so many requests, to be sent in one go. LAST: one after which the server closes the connection.
# shellcheck disable=SC2046,SC2059 # numbers are words; the format has the path
gets() { printf "GET /kv-store/$2 HTTP/1.1\r\nHost: test\r\n\r\n%.0s" $(seq "$1"); }
readonly LAST=$'GET /kv-store HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n'

# ---- Checks: one line each -------------------------------------------------------------------------------------------

# check WHAT EXPECTED GOT. Where `later` asks again, a check that fails is not yet reported.
check() {
  local what="${section:+$section: }$1"
  if given_up; then
    skipped=$((skipped + 1))
  elif [ "$2" = "$3" ]; then
    passed=$((passed + 1))
    report ok "$what" 1 ''
  elif [ -n "${again:-}" ]; then
    : >"$work/sent"
    return 1
  else
    failed=$((failed + 1))
    report FAIL "$what" 1 "$(sed 's/^/sent      /' "$work/sent" | cut -c 1-1000
      printf 'expected  %s\ngot       %s' "$(short "$2")" "$(short "$3")")"
  fi
  : >"$work/sent"
}
skip() { given_up && check "$1" '' ''; } # WHAT: counts a check that cannot be made
report_skipped() { # one line for all checks that could not be made in this section. They have failed.
  [ "$skipped" -eq 0 ] || report FAIL "$section: $skipped checks could not be made" "$skipped" "$hopeless"
  unmade=$((unmade + skipped)) skipped=0
}
report() { # MARK WHAT POINTS EXPLANATION
  reported=$((reported + 1))
  case $style in
    text) printf '%-5s %s\n' "$1" "$2" && indent '      ' "$4" ;;
    tap) printf '%s %s - %s\n' "${1/FAIL/not ok}" "$reported" "$2" && indent '# ' "$4" ;;
    json)
      jq -n -c --arg name "$2" --arg mark "$1" --argjson points "$3" --arg output "$4" \
        '{name: $name, score: (if $mark == "ok" then $points else 0 end), max_score: $points, output: $output}' \
        >>"$work/tests"
      ;;
  esac
}
indent() { [ -z "$2" ] || printf '%s\n' "$2" | sed "s/^/$1/"; } # PREFIX TEXT
# plain: without escape sequences and other control characters. short TEXT: that, on one line, not too long.
plain() { sed -E 's/\x1b\[[0-9;?]*[@-~]//g' | tr '\r\t' '  ' | tr -d '\000-\010\013-\037\177'; }
short() { plain <<<"$1" | tr -s '\n ' ' ' | sed -E 's/ $//; s/^(.{500}).+/\1.../'; }

# check_that WHAT CONDITION: the condition is an arithmetic expression.
check_that() { check "$1" "true: $2" "$(if (($2)); then echo true; else echo false; fi): $2"; }
# check_answer WHAT ANSWER GOT: equal, where we are strict. check_within WHAT ANSWER GOT: it may have more members.
check_answer() { if "$strict"; then check "$@"; else check_within "$@"; fi; }
check_within() { check_all "$1" 1 "$2" "$3"; }
# expect WHAT ANSWER INSTANCE VERB PATH [CURL ARGUMENT...]: the answer is "STATUS BODY".
expect() { check_answer "$1" "$2" "$(ask "${@:3}")"; }
# expect_all WHAT COUNT ANSWER INSTANCE VERB PATH [CURL ARGUMENT...]: so many such answers. They may have more members.
expect_all() { check_all "$1" "$2" "$3" "$(ask "${@:4}")"; }
check_all() { # WHAT COUNT ANSWER ANSWERS
  local judged expected="$2 times $3" got
  if skip "$1"; then return; fi
  mapfile -t judged < <(judge "$3" <<<"$4")
  got=${judged[0]}
  if [ "$2" = 1 ]; then # no count is told
    if [ "$got" = "$expected" ]; then got=$3; else got=$4; fi
    expected=$3
  fi
  check "$1" "$expected" "$got" && forgive "${judged[@]:1}"
}
# told WHAT FILTER EXPECTED ANSWER: what jq makes of an answer.
told() { check "$1" "$2 is $3" "$2 is $(body <<<"$4" | jq -c "$2" 2>/dev/null || echo "not in $4")"; }

# later CHECK...: repeats a check, until it passes or everything should have settled; where we are strict, on a machine
# however slow.
later() {
  local again=yes deadline=$settled
  "$strict" && deadline=$((SECONDS + 60))
  until "$@"; do
    sleep 0.1
    if [ "$SECONDS" -ge "$deadline" ] || given_up; then again=''; fi
  done
}
on() { # "INSTANCE..." CHECK...: makes a check of each of them, with its name in place of NODE
  local instance words=("${@:2}")
  for instance in $1; do "${words[@]//NODE/$instance}"; done
}
# await WHAT EXPECTED COMMAND...: until this is what the command prints.
await() { later check_output "$@"; }
check_output() { skip "$1" || check "$1" "$2" "$("${@:3}")"; }
check_less() { check_that "$1" "$("${@:3}") < $2"; } # WHAT LIMIT COMMAND...: it prints less

# judge ANSWER: of the answers that are read, how many are such, and the first that is none; then their mistakes, a line
# each. Objects may have more members than expected, and "(any)" is any value. A mistake that was made before in this
# section does not count, unless it begins with "!": it is one of substance.
judge() {
  jq -n -R -r --arg want "$1" --rawfile before "$work/mistakes" '
    def members: try (.[4:] | fromjson) catch null;
    def wrong_member($name; $value; $got):
      if ($got | has($name)) and ($value == "(any)" or $got[$name] == $value) then empty
      elif $name == "value" and all($got[]; . != $value) then "!not the value"
      elif $got | has($name) then "\($name) is \($got[$name])"
      else "no member \($name)" end;
    def mistakes($got):
      if .[:3] == $want[:3] then empty
      else (if .[:1] == $want[:1] then "" else "!" end) + "status \(.[:3]) in place of \($want[:3])" end,
      if ($got | type) != "object" then (if $want[:1] == "2" then "!" else "" end) + "no JSON object"
      else $want | members | keys[] as $name | wrong_member($name; .[$name]; $got) end;
    [inputs | {answer: ., mistakes: ([mistakes(members)] - ($before / "\n"))}]
    | map(select(.mistakes != [])) as $others
    | "\(length - ($others | length)) times \($want)" + (($others[0] | values | "; also: \(.answer)") // ""),
      ($others | map(.mistakes[]) | unique[])'
}
# forgive MISTAKE...: the next time they do not count.
forgive() { "$strict" || printf '%s\n' "$@" | sed '/^!/d' >>"$work/mistakes"; }

# ---- The table of answers --------------------------------------------------------------------------------------------

form_error() { echo "$1 {\"result\":\"Error\",\"msg\":\"$2\"}"; }                                     # STATUS ERROR
form_value() { echo "200 {\"result\":\"Success\",\"value\":\"$1\"}"; }                                # TEXT
json_error() { echo "$1 {\"error\":\"$2\",\"message\":\"Error in ${3:-PUT}\"}"; } # STATUS ERROR [VERB]
json_value() { echo "200 {\"doesExist\":true,\"message\":\"Retrieved successfully\",\"value\":$1}"; } # JSON
no_such_key() { json_error 404 'Key does not exist' "$1" | sed 's/{/{"doesExist":false,/'; } # VERB

MADE='201 {"replaced":"False","msg":"New key created"}'
REPLACED='200 {"replaced":"True","msg":"Value of existing key replaced"}'
DELETED='200 {"result":"Success"}'
NO_KEY=$(form_error 404 'Key does not exist')
NO_VALUE=$(form_error 403 'No value provided')
BAD_KEY=$(form_error 403 'Key not valid')
TOO_LARGE=$(form_error 403 'Object too large. Size limit is 1MB')
NO_MAIN=$(form_error 501 'Server unavailable')
NOT_FOUND=$(form_error 404 'Not found')
NO_VERB=$(form_error 405 'Method not allowed')
ADDED='201 {"message":"Added successfully","replaced":false}'
UPDATED='200 {"message":"Updated successfully","replaced":true}'
REMOVED='200 {"doesExist":true,"message":"Deleted successfully"}'
CHANGED='200 {"message":"View change successful"}'
SHARDS='200 {"message":"Shard membership retrieved successfully","shards":' # and the rest of it, like the next ones
SHARD='200 {"message":"Shard information retrieved successfully","shard-id":'
COUNTED='200 {"message":"Key count retrieved successfully","key-count":'
NO_OBJECT=$(json_error 400 'Body is not a JSON object')
MISSING=$(json_error 400 'Value is missing')
VALUE_TOO_LARGE=$(json_error 413 'Value is too large')
LONG_KEY=$(json_error 400 'Key is too long')
MAIN_DOWN=$(json_error 503 'Main instance is down' GET)
NO_UTF8=$(json_error 400 'Value is not valid UTF-8')
NO_ADDRESS=$(json_error 400 'ADDRESS is not set')

# The same outcomes in both vocabularies, for the tests that are made in either.
vocabulary=form below=''  # form or json; below: what stands before keys in paths, nothing or keys/
declare -A ANSWERS=(
  [form made]=$MADE           [json made]=$ADDED
  [form replaced]=$REPLACED   [json replaced]=$UPDATED
  [form deleted]=$DELETED     [json deleted]=$REMOVED
  [form found]=$(form_value VALUE) [json found]=$(json_value '"VALUE"')
  [form absent]=$NO_KEY       [json absent]=$(no_such_key VERB)
  [form valueless]=$NO_VALUE  [json valueless]=$MISSING
  [form bad_key]=$BAD_KEY     [json bad_key]=$LONG_KEY
  [form main_gone]=$NO_MAIN   [json main_gone]=${MAIN_DOWN/GET/VERB}
)
# stores WHAT ANSWER VALUE INSTANCE PATH [CURL ARGUMENT...]: a PUT is answered so, and GET finds this value (JSON) then.
stores() {
  local path=${5%%\?*} found="200 {\"result\":\"Success\",\"value\":$3}"
  if [[ $5 = keys/* ]]; then found=$(json_value "$3"); fi
  expect "$1" "$2" "$4" PUT "$5" --path-as-is "${@:6}"
  expect "... which is found" "$found" "$4" GET "$path" --path-as-is
}
key() { # OUTCOME WHAT INSTANCE VERB KEY [VALUE]: the value is what a PUT sends, and a GET should find
  local answer=${ANSWERS[$vocabulary $1]} data=()
  answer=${answer/VERB/$4}
  case $vocabulary,$4 in
    form,PUT) data=(${6+--data-urlencode "val=$6"}) ;;
    json,PUT) data=("${json[@]}" -d "{${6+\"value\":\"$6\"}}") ;;
    json,*) data=("${json[@]}") ;;
  esac
  expect "$2" "${answer/VALUE/"${6-}"}" "$3" "$4" "$below$5" "${data[@]}"
}

key_stored() { # OUTCOME WHAT INSTANCE KEY VALUE WHAT READER: a PUT has this outcome, and the reader finds the key
  key "$1" "$2" "$3" PUT "$4" "$5"
  key found "$6" "$7" GET "$4" "$5"
}

test_single() { # INSTANCE: what every kv-store answers, in either vocabulary
  local i=$1 signs='a b & c=d + 100%' longest=200 long
  [ "$vocabulary" = form ] || longest=50
  long=$(letters "$longest" k)
  key absent "GET of no key" "$i" GET foo
  key absent "DELETE of no key" "$i" DELETE foo
  key_stored made "PUT makes a key" "$i" foo bar "GET finds it" "$i"
  key_stored replaced "PUT replaces the value" "$i" foo baz "GET finds the new value" "$i"
  key made "PUT makes another key" "$i" PUT other_2 2
  key found "... and the first has kept its value" "$i" GET foo baz
  key absent "case counts in keys" "$i" GET FOO
  key_stored replaced "PUT of a value with spaces and signs" "$i" other_2 "$signs" "... which comes back as it was" "$i"
  key valueless "PUT without a value" "$i" PUT foo
  key_stored made "a key of $longest characters" "$i" "$long" long "... which is found" "$i"
  key bad_key "a key of $((longest + 1)) characters is too long" "$i" PUT "${long}k" long
  if [ "$vocabulary" = form ]; then test_sizes "$i"; fi
  key found "a refused PUT leaves the value" "$i" GET foo baz
  key deleted "DELETE removes the key" "$i" DELETE foo
  key absent "GET of a deleted key" "$i" GET foo
  key absent "DELETE of a deleted key" "$i" DELETE foo
  key_stored made "PUT makes a deleted key new" "$i" foo again "... with the new value" "$i"
  key found "the other key is still there" "$i" GET other_2 "$signs"
}
test_sizes() { # INSTANCE
  (printf val= && letters 900000) >"$work/val=,900000_letters"
  (printf val= && letters 1100000) >"$work/val=,1100000_letters"
  expect "a value of 900,000 bytes" "$MADE" "$1" PUT large -H Expect: -d "@$work/val=,900000_letters"
  check "... which comes back" "900000 letters" "$(ask "$1" GET large | length_of_value)"
  expect "a value of 1,100,000 bytes is too large" "$TOO_LARGE" "$1" PUT foo -H Expect: -d "@$work/val=,1100000_letters"
}
length_of_value() { # of the answer that it reads; or the answer, if it has none
  jq -R -r '. as $answer | try (if .[:1] == "2" then .[4:] | fromjson else error end
    | .value // ([.[] | strings] | max_by(length)) | "\(length) letters") catch $answer[:300]'
}
goes() { # INSTANCE KEY...
  local key
  for key in "${@:2}"; do check "... and goes" 200 "$(status_of "$1" DELETE "keys/$key" --path-as-is)"; done
}

test_form() { # INSTANCE: what this project promises besides, like test_json. Some keys are there.
  local i=$1
  test_single "$i"
  expect "the other vocabulary reads what is there" "$(json_value '"again"')" "$i" GET keys/foo
  expect "PUT with another field" "$NO_VALUE" "$i" PUT foo -d value=1
  expect "PUT with a body that is no form" "$NO_VALUE" "$i" PUT foo -H 'Content-Type: text/html' -d val=bar
  expect "PUT with a form in parts" "$NO_VALUE" "$i" PUT foo -F val=bar
  expect "PUT with a key that is not valid" "$BAD_KEY" "$i" PUT f-oo -d val=bar
  expect "the key is checked before the value" "$BAD_KEY" "$i" PUT f-oo
  expect "PUT with a value that is not UTF-8" "$(form_error 403 'Value is not valid UTF-8')" "$i" PUT foo -d val=%ff
  expect "no refused PUT changes the value" "$(form_value again)" "$i" GET foo
  stores "PUT with an empty value" "$REPLACED" '""' "$i" foo -d val=
  stores "the first val counts, of the body" "$REPLACED" '"1"' "$i" 'foo?val=4' -d 'a=0&val=1&val=2'
  stores "PUT with the value in the query, decoded" "$REPLACED" '"a b!"' "$i" 'foo?val=a+b%21'
  expect "GET of a key that cannot exist" "$NO_KEY" "$i" GET f-oo
  expect "no such path" "$NOT_FOUND" "$i" GET a/b
  expect "no such path at the top" "$NOT_FOUND" "$i" GET /
  expect "a verb that a key does not take" "$NO_VERB" "$i" POST foo -d val=1
  goes "$i" foo other_2 large "$(letters 200 k)"
}
test_json() { # INSTANCE
  local i=$1 vocabulary=json below=keys/ long verb path allowed
  test_single "$i"
  long=$(letters 51 k)
  expect "PUT on the path of both vocabularies" "$UPDATED" "$i" PUT foo "${json[@]}" -d '{"value":"baz"}'
  expect "the other vocabulary reads it" "$(form_value baz)" "$i" GET foo
  expect "the type may have parameters and any case" "$(json_value '"baz"')" "$i" GET foo \
    -H 'content-type: Application/JSON; charset=utf-8'
  expect "PUT without a body" "$MISSING" "$i" PUT keys/foo "${json[@]}"
  expect "PUT with null" "$MISSING" "$i" PUT keys/foo -d '{"value":null}'
  expect "PUT with an array as body" "$NO_OBJECT" "$i" PUT keys/foo -d '["value"]'
  expect "PUT with half a body" "$NO_OBJECT" "$i" PUT keys/foo -d '{"value":"b'
  expect "the key is checked before the value" "$LONG_KEY" "$i" PUT "keys/$long"
  expect "a refused PUT leaves the value" "$(json_value '"baz"')" "$i" GET keys/foo
  goes "$i" foo other_2 "${long:1}"
  expect "GET of a key that cannot exist" "$(no_such_key GET)" "$i" GET "keys/$(letters 300 k)"
  expect "no such path" "$(json_error 404 'Not found' GET)" "$i" GET /nowhere "${json[@]}"
  for path in shards shards/1; do expect "$path without ADDRESS" "${NO_ADDRESS/PUT/GET}" "$i" GET "$path"; done
  check "a view change without ADDRESS" "$NO_ADDRESS" "$(change "$i" '"view":"a:1"')"
  while read -r verb path allowed; do
    expect "$path does not take $verb" "$(json_error 405 'Method not allowed' "$verb")" "$i" "$verb" "$path"
    check "... and says what it takes" "$allowed" \
      "$(curl -s -o /dev/null -w '%header{allow}' -X "$verb" "${url[$i]}$path")"
  done <<END
PATCH  /kv-store/keys/foo    GET, HEAD, PUT, DELETE
PUT    /kv-store/key-count   GET, HEAD
GET    /kv-store/view-change PUT
DELETE /kv-store/            GET, HEAD
END
}

test_values() { # INSTANCE: values and keys that need encoding, or that only look like something else
  local i=$1 value back pair key
  for value in '"text"' '""' 0 -12.50 1e400 123456789012345678901234567890 true false '[]' '{"a":{"b":null}}' \
    '[1,"two",null,{"three":[]}]' '"\"\\\/\b\f\n\r\t\u0001"'; do
    # What JSON lets one write in several ways comes back in the shortest.
    back=${value//\\\//\/}
    stores "PUT $value" "$ADDED" "$back" "$i" keys/v -d "{\"value\":$value}"
    expect "... in the other vocabulary too" "200 {\"result\":\"Success\",\"value\":$back}" "$i" GET v
    goes "$i" v
  done
  for value in '"\ud800"' '"a\udc00b"' '["\ud83d\ude00","\ud800"]' '{"\udc00":1}' $'"a\xffb"' $'"\xed\xa0\x80"'; do
    expect "a value that no UTF-8 holds: ${value@Q}" "$NO_UTF8" "$i" PUT keys/v -d "{\"value\":$value}"
  done
  for value in $'"x":"\xff","value":1' $'"\xff":1,"value":1' $'"value":["\xff"]' $'"value":1,"x":["\xff"]' \
    $'"value":1}\xff'; do
    expect "no UTF-8 elsewhere: ${value@Q}" "$NO_OBJECT" "$i" PUT keys/v -d "{$value}"
  done
  (printf '{' && seq -f '"member %.0f":null,' 150000 && printf '"v\\u0061lue":1}') >"$work/body"
  stores "the value among many members" "$ADDED" 1 "$i" keys/v -d "@$work/body"
  goes "$i" v
  # As a form has them, and as JSON spells them.
  for pair in 'a+b a b' 'a%2Bb a+b' '100%25 100%' '%2541 %41' 'a%22b a\"b' 'a%5Cb a\\b' 'a%0Ab a\nb' 'a%09b a\tb' \
    '%F0%9F%98%80+%C3%BCn%C3%AF 😀 ünï' 'a%26b%3Dc a&b=c' '%3C%3E%23%3F/ <>#?/' 'a%00b a\u0000b'; do
    value="\"${pair#* }\""
    stores "a form with $value" "$MADE" "$value" "$i" enc -d "val=${pair%% *}"
    stores "... as JSON" "$UPDATED" "$value" "$i" keys/enc -d "{\"value\":$value}"
    expect "... in the other vocabulary too" "200 {\"result\":\"Success\",\"value\":$value}" "$i" GET enc
    goes "$i" enc
  done
  for key in a%20b a+b a%25b %22 %5C a%2Fb %2F . .. %2e%2e %00 %F0%9F%98%80 %C3%BC '%C3%BC%C3%BC' a%3Fb a%23b 'a;b=c' \
    key-count view-change keys "$(printf '%%C3%%BC%.0s' {1..50})"; do
    stores "the key $key" "$ADDED" "\"of $key\"" "$i" "keys/$key" -d "{\"value\":\"of $key\"}"
    goes "$i" "$key"
  done
  for key in %ff ''; do expect "the key '$key'" "$LONG_KEY" "$i" PUT "keys/$key" -d '{"value":1}'; done
}

make_large_values() { # values of the limit and over it, in files, also for other tests
  (printf val= && letters "$LIMIT") >"$work/full"
  (cat "$work/full" && printf v) >"$work/over"
  (printf '{"value":"' && letters "$LIMIT" && printf '"}') >"$work/full.json"
  sed 's/v"}/vv"}/' "$work/full.json" >"$work/over.json"
  sed 's#vv#\\/\\/#g' "$work/full.json" >"$work/escaped.json"
  (printf '{"value":' && letters 100000 '[' && letters 100000 ']' && printf '}') >"$work/deep.json"
  head -c 100000 "$work/deep.json" >"$work/deeper.json"
  letters 20000000 >"$work/huge"
}
test_limits() { # INSTANCE
  local i=$1
  expect "a value of exactly the limit" "$MADE" "$i" PUT big -d "@$work/full"
  check "... comes back" "$LIMIT letters" "$(ask "$i" GET big | length_of_value)"
  expect "one byte more" "$TOO_LARGE" "$i" PUT big -d "@$work/over"
  expect "exactly the limit in JSON" "$UPDATED" "$i" PUT keys/big -d "@$work/full.json"
  expect "exactly the limit, all of it escaped" "$UPDATED" "$i" PUT keys/big -d "@$work/escaped.json"
  expect "one byte more in JSON" "$VALUE_TOO_LARGE" "$i" PUT keys/big -d "@$work/over.json"
  expect "20 MB" "$TOO_LARGE" "$i" PUT big -d "@$work/huge" -H Expect:
  expect "... with a verb that a key does not take" "$NO_VERB" "$i" POST big -d "@$work/huge" -H Expect:
  expect "the key is checked before the size" "$BAD_KEY" "$i" PUT b-g -d "@$work/over"
  check "the value is still there" "$LIMIT letters" "$(ask "$i" GET big | length_of_value)"
  expect "JSON nested 100,000 deep" "$ADDED" "$i" PUT keys/deep -d "@$work/deep.json"
  check "... comes back" 200063 "$(curl -s "${url[$i]}/kv-store/keys/deep" | wc -c)"
  expect "JSON that never closes" "$NO_OBJECT" "$i" PUT keys/deep -d "@$work/deeper.json"
  goes "$i" big deep
}

# ---- HTTP that clients survive ---------------------------------------------------------------------------------------

# expect_raw WHAT ANSWERS INSTANCE BYTES: answers are "STATUS BODY STATUS BODY ...".
expect_raw() { check "$1" "$2" "$(raw "$3" "$4" | statuses)"; }
statuses() { tr -d '\r' | grep -a -o -E '^HTTP/1.1 [0-9]+|^\{.*|STILL OPEN' | sed 's|HTTP/1.1 ||' | paste -sd' '; }

CLOSE='Connection: close\r\n\r\n' GET='GET /kv-store/h HTTP/1.1\r\n' PUT='PUT /kv-store/h HTTP/1.1\r\n'
FIVE='Content-Length: 5\r\n' CHUNKS='Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n'
ONE=$(form_value 1) # what the key h has
BAD=$(form_error 400 'Bad request')
NO_LENGTH=$(form_error 411 'Length required')
UNPARSED=$(form_error 400 'Bad request: not HTTP/1.1, or more than 16 headers')

test_http() { # INSTANCE: where requests begin and end
  local i=$1 n fd body="$FIVE\r\nval=1" puts=''
  expect_raw "a new key, kept open, then closed" "$MADE $ONE" "$i" "$PUT$body$GET$CLOSE"
  expect_raw "not HTTP" "$UNPARSED" "$i" 'hello\r\n\r\n'
  expect_raw "HTTP/2" "$UNPARSED" "$i" 'GET /kv-store/h HTTP/2.0\r\n\r\n'
  expect_raw "not HTTP after two requests" "$ONE $ONE $UNPARSED" "$i" "$GET\r\n$GET\r\nhello\r\n\r\n"
  for n in abc -1 +5 0x5 '5, 5' '' 99999999999999999999999; do
    expect_raw "Content-Length: $n" "$BAD" "$i" "${PUT}Content-Length: $n\r\n\r\nval=2"
  done
  expect_raw "two lengths that differ" "$BAD" "$i" "$PUT${FIVE}Content-Length: 6\r\n\r\nval=23"
  expect_raw "two lengths that agree" "$REPLACED" "$i" "$PUT$FIVE$FIVE${CLOSE}val=1"
  expect_raw "a length of a terabyte" "$TOO_LARGE" "$i" "${PUT}Content-Length: 1000000000000\r\n\r\nval=2"
  expect_raw "a chunked body" "$NO_LENGTH" "$i" "$PUT$CHUNKS"
  expect_raw "a chunked body after a request" "$ONE $NO_LENGTH" "$i" "$GET\r\n$PUT$CHUNKS"
  expect_raw "chunked and a length" "$NO_LENGTH" "$i" "$PUT$FIVE$CHUNKS"
  expect_raw "pipelined, the last one closes" "$ONE $REPLACED $ONE $ONE" "$i" "$GET\r\n$PUT$body$GET\r\n$GET$CLOSE"
  check "a body of 70 MB on GET" 404 "$(letters 70000000 | status_of "$i" GET /kv-store/none --data-binary @-)"
  expect_raw "bodies on GET and DELETE" "$ONE $NOT_FOUND $ONE" "$i" "$GET${body}DELETE /n HTTP/1.1\r\n$body$GET$CLOSE"
  expect_raw "asked to continue" "100 $REPLACED" "$i" "${PUT}Expect: 100-continue\r\n$FIVE${CLOSE}val=1"
  for n in PUT DELETE; do
    connect "$i"
    printf '%s /kv-store/h HTTP/1.1\r\nHost: test\r\nContent-Length: 500\r\n\r\nval=2' "$n" >&"$fd"
    exec {fd}>&-
  done
  expect "half a body is no request, and none of it changed the value" "$ONE" "$i" GET /kv-store/h
  for n in {1..500}; do puts+="${PUT}Content-Length: 8\r\n\r\nval=$((n + 1000))"; done
  check "500 PUTs in one go" "500 $REPLACED 1 $(form_value 1500)" "$(raw "$i" "$puts$GET$CLOSE" | answers_counted)"
  check "PUTs of the limit, DELETE" "4 $REPLACED 1 $DELETED" "$(put_large_and_delete | exchange "$i" | answers_counted)"
  check_that "memory stays under 64 MiB" "$(status_field "$i" VmHWM) < 65536"
}
put_large_and_delete() {
  for _ in 1 2 3 4; do
    printf 'PUT /kv-store/h HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n' $((LIMIT + 4)) && cat "$work/full"
  done
  printf 'DELETE /kv-store/h HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n'
}
# answers_counted: equal ones that follow on one another as one, with their number.
answers_counted() { statuses | sed 's/} /}\n/g' | uniq -c | xargs -d '\n' | sed -E 's/ +/ /g; s/^ //'; }

test_heads() { # INSTANCE: what stands in the heads of requests
  local i=$1 n path='/kv-store/h HTTP/1.1\r\n' hosted='GET /kv-store/h HTTP/1.\x31\r\n'
  expect "(a key)" "$MADE" "$i" PUT h -d val=1
  expect_raw "16 headers" "$ONE" "$i" "$GET$(printf 'X-%s: y\\r\\n' {1..14})$CLOSE"
  expect_raw "17 headers" "$UNPARSED" "$i" "$GET$(printf 'X-%s: y\\r\\n' {1..15})$CLOSE"
  for n in '' 'Connection: Keep-Alive\r\n'; do
    expect_raw "HTTP/1.0 cannot stay ($n)" "$ONE" "$i" "GET /kv-store/h HTTP/1.0\r\n$n\r\n"
  done
  expect_raw "a target in absolute form" "$ONE" "$i" "GET http://somewhere:99$path$CLOSE"
  expect_raw "... with a query that looks like a path" "$NOT_FOUND" "$i" "GET http://somewhere?$path$CLOSE"
  expect_raw "... without a host" "$BAD" "$i" "GET http://$path\r\n"
  for n in '' 'Host: a\r\nHost: a\r\n' 'Host: a b\r\n' 'Host: a/b\r\n' 'Host: a:b\r\n' 'Host: user@a\r\n'; do
    expect_raw "a host that is none ($n)" "$BAD" "$i" "$hosted$n\r\n"
  done
  for n in '' 'a' 'a:80' '127.0.0.1:80' '[::1]:80' 'a_b.c'; do
    expect_raw "the host $n" "$ONE" "$i" "${hosted}Host: $n\r\n$CLOSE"
  done
  expect "a head of 70,000 bytes" "$BAD" "$i" GET /kv-store/h -H "X: $(letters 70000)"
  expect_raw "CONNECT" "$NO_VERB" "$i" "CONNECT /kv-store/h HTTP/1.1\r\n$CLOSE"
  expect_raw "OPTIONS *" "$NOT_FOUND" "$i" "OPTIONS * HTTP/1.1\r\n$CLOSE"
  expect_raw "a target with a host" "$NOT_FOUND" "$i" "GET @${address[main]}/kv-store HTTP/1.1\r\n$CLOSE"
  expect_raw "HEAD between other requests" "$ONE 200 $ONE" "$i" "$GET\r\nHEAD $path\r\n$GET$CLOSE"
  expect_raw "HEAD that is refused" 400 "$i" "${hosted/GET/HEAD}\r\n"
  expect_raw "HEAD with a chunked body" 411 "$i" "HEAD $path$CHUNKS"
  check "HEAD gives the length that GET has" "$((${#ONE} - 3))" \
    "$(curl -s -I -o /dev/null -w '%header{content-length}' "${url[$i]}/kv-store/h")"
  goes "$i" h
}

readonly IDLE_CLIENTS=500
open_idle_clients() { # COUNT INSTANCE
  local fd
  while [ ${#idle[@]} -lt "$1" ]; do connect "$2" && idle+=("$fd"); done
  idle_until=$((SECONDS + 90))
  ask "$2" GET /kv-store >/dev/null # is answered when all have been accepted
}
test_idle() { # INSTANCE
  local fd open=0
  check "others are served beside $IDLE_CLIENTS idle clients" 200 "$(status_of "$1" GET /kv-store)"
  for fd in "${idle[@]}"; do
    read -r -n 1 -t "$((SECONDS < idle_until ? idle_until - SECONDS : 1))" _ <&"$fd"
    [ $? -eq 1 ] || open=$((open + 1))
    exec {fd}>&-
  done
  check "all of them were sent away after 75 seconds" 0 "$open"
}

# What clients do to an instance of their own, which has a value of the limit. It answers others meanwhile, stays up,
# and never takes more than 64 MiB. $crowd is clients at work, ${held[@]} connections that stay open.
test_many_clients() {
  local fd held crowd what
  for what in endless_head endless_pipelines clients_that_leave long_pipeline unread_answers resting_clients; do
    held=() crowd=''
    start beset
    expect "$what: there is something to read" "$MADE" beset PUT big -d "@$work/full"
    "$what"
    check "$what: others are answered in less than a second" 20 \
      "$(timed beset 'none[1-20]' | awk '$1 == 404 && $2 < 1' | wc -l)"
    check "$what: who reads a large value gets it" "$LIMIT letters" "$(ask beset GET big | length_of_value)"
    if [ -n "$crowd" ]; then wait "$crowd"; fi
    check_that "$what: memory stays under 64 MiB" "$(status_field beset VmHWM) < 65536"
    for fd in "${held[@]}"; do exec {fd}>&-; done
    check "$what: it goes on" 200 "$(status_of beset GET /kv-store)"
    act kill beset
  done
}
endless_head() {
  check "endless head: it is refused" "$BAD" "$({ printf 'GET / HTTP/1.1\r\nX: ' && letters 250000000 2>/dev/null; } |
    exchange beset | statuses)"
}
long_pipeline() {
  check_that "long pipeline: 200 large answers" "$( (gets 200 big && printf %s "$LAST") | exchange beset | wc -c) > \
    $((200 * LIMIT))"
}
endless_pipelines() { at_once 8 endless_pipeline & crowd=$!; }
endless_pipeline() { (timeout 4 yes "$(gets 1 none)" && printf %s "$LAST") | exchange beset; }
clients_that_leave() { at_once 8 ask_and_leave & crowd=$!; }
ask_and_leave() { for _ in {1..200}; do (connect beset && gets 30 big >&"$fd"); done; }
unread_answers() { for _ in {1..150}; do connect beset && gets 5 big >&"$fd" && held+=("$fd"); done; }
resting_clients() {
  for _ in {1..250}; do
    connect beset && gets 1 big >&"$fd" && held+=("$fd")
    head -c "$LIMIT" <&"$fd" >/dev/null
  done
}

test_large_answers() { # many large answers at once by way of a follower
  status_of main PUT large -d "@$work/full" >/dev/null
  for _ in {1..4}; do
    at_once 150 get_large
    check "150 at once through a follower" "150 200 $((LIMIT + 65))" "$(output | sort | uniq -c | xargs)"
  done
  check "the instances go on" "200 200" "$(status_of main GET /kv-store) $(status_of follower DELETE large)"
}
# (On a machine that is busy, the main instance may be silent for too long. curl asks again when the answer is 503.)
get_large() {
  local written='%{http_code} %{size_download}\n'
  curl -s -f --retry 9 --retry-delay 1 -o /dev/null -w "$written" "${url[follower]}/kv-store/keys/large"
}

STREAM='Content-Type: application/x-kv-store-stream'
stream_half() { # INSTANCE VERB ID [HEADER]: connects and sends the head of one request of a stream
  connect "$1"
  printf '%s\r\n' "$2 /kv-store?stream=$3 HTTP/1.1" 'Host: test' "$STREAM" "${@:4}" '' >&"$fd"
}
open_stream() { # INSTANCE: opens a stream as other instances do: its answers are descriptor $answers, its questions $fd
  local line id=$RANDOM$RANDOM$RANDOM
  stream_half "$1" GET "$id" && answers=$fd
  read -r -t 20 -u "$answers" line && [ "$line" = $'HTTP/1.1 200 OK\r' ] || return 1
  stream_half "$1" POST "$id" 'Content-Length: 1000000000'
}
# question REQUEST: a request (for printf's %b) as it is on a stream: the length, a number, the time 0, that something
# follows, and the request. BIG: asks for the key `big`.
question() {
  local length=$((3 + $(printf '%b' "$1" | wc -c)))
  printf '%b' "$(printf '\\x%02x' $((length % 256)) $((length / 256)))\\0\\0\\x01\\0\\x01$1"
}
BIG='\x03GET\x0d/kv-store/big\0\0\0\0'

# Streams on which large values are asked for and nothing is read; those that are left while what they asked for takes
# its time; those on which nothing is asked. Nothing is kept for them.
test_streams() {
  local instance fds answers files before
  start flooded && start relaying FORWARDING_ADDRESS="${address[flooded]}"
  expect "there is something to read" "$MADE" relaying PUT big -d "@$work/full"
  for _ in {1..500}; do question "$BIG"; done >"$work/stream"
  for instance in flooded relaying; do
    fds=()
    for _ in {1..20}; do open_stream "$instance" && cat "$work/stream" >&"$fd" && fds+=("$fd" "$answers"); done
    check "$instance: they are streams" 40 ${#fds[@]}
    sleep 1 # there is nothing to see of what it has read
    check "$instance: others are answered meanwhile" 200 "$(status_of "$instance" GET /kv-store)"
    for fd in "${fds[@]}"; do exec {fd}>&-; done
    later check_less "$instance: with the clients, the memory goes" 65536 status_field "$instance" VmRSS
  done
  check_that "memory stays under 128 MiB" "$(status_field flooded VmHWM) < 131072"
  check_that "... where answers come that were asked for before, 512 MiB" "$(status_field relaying VmHWM) < 524288"

  files=$(files_of relaying) fds=()
  act pause flooded
  for _ in {1..300}; do
    open_stream relaying && question "$BIG" >&"$fd" && fds+=("$fd")
    exec {fd}>&- {answers}>&-
  done
  check "they were streams" 300 "${#fds[@]}"
  later check_less "... and leave no files open" $((files + 100)) files_of relaying
  act resume flooded

  before=$(metric flooded connections) fds=()
  for _ in {1..300}; do stream_half flooded GET "$RANDOM$RANDOM$RANDOM" && fds+=("$fd"); done
  for _ in {1..100}; do open_stream flooded && fds+=("$fd" "$answers"); done
  later check_less "streams without requests, and halves, are closed" $((before + 50)) metric flooded connections
  for fd in "${fds[@]}"; do exec {fd}>&-; done
}
files_of() { find "/proc/$("pid_$where" "$1")/fd" 2>/dev/null | wc -l; } # INSTANCE

test_unread_stderr() { # nobody reads stderr: the lines are lost, and not the instance
  local fd
  mkfifo "$work/unheard.log"
  exec {fd}<>"$work/unheard.log"
  start unheard
  for _ in {1..3000}; do (printf 'hello\r\n\r\n' >"/dev/tcp/${address[unheard]/://}") 2>/dev/null; done
  check "others are served after 3000 malformed requests" 200 "$(status_of unheard GET /kv-store)"
  exec {fd}>&-
}

# ---- A follower and its main instance --------------------------------------------------------------------------------

test_forwarding() { # what every follower does besides answering as its main instance, in either vocabulary
  local verb
  key_stored made "PUT through the follower makes a key" follower shared bar "... which the main instance has" main
  key_stored replaced "PUT to the main instance replaces the value" main shared baz "... the follower sees it" follower
  key deleted "DELETE through the follower removes the key" follower DELETE shared
  key absent "... which the main instance has no more" main GET shared
  key made "PUT to the main instance makes it again" main PUT shared again
  act stop main
  for verb in GET PUT DELETE; do key main_gone "the main instance has stopped: $verb" follower "$verb" shared bar; done
  restart main
  later key absent "the main instance has started again: the follower reaches it" follower GET never
  key_stored made "... PUT" follower back bar "... which the main instance has then" main
}

test_main_gone() { # continues with test_forwarding: there is one key
  local began
  check "what was written once is stored once" 1 "$(count main)"
  act stop main
  check "main ends with status 0, before it is killed" 0 "$ended"
  began=$(now)
  expect "the error in JSON" "$MAIN_DOWN" follower GET keys/foo
  check_that "... within 1.5 s (ms)" "$(now) - $began < 2500"
  expect "the error of a path that may not exist" "$NO_MAIN" follower GET /nowhere
  expect "keys that need another way" "$MAIN_DOWN" second GET keys/.. --path-as-is
  expect "a follower of the follower says the same" "$NO_MAIN" second GET foo
  check "the follower itself answers" 200 "$(status_of follower GET /kv-store)"
  expect "HTTP errors are the follower's own" "$VALUE_TOO_LARGE" follower PUT keys/x -H Expect: -d "@$work/huge"
  restart main
  expect "back: keys that need another way" "$(no_such_key GET)" second GET keys/.. --path-as-is
}

test_instances() {
  local itself="200 {\"result\":\"Success\",\"role\":\"main\",\"version\":\"$VERSION\",\"key-count\":0}"
  local relays="\"role\":\"follower\",\"version\":\"$VERSION\",\"forwarding-address\":\"${address[main]}\""
  expect "main says what it is" "$itself" main GET /kv-store
  expect "... with a slash too" "$itself" main GET /kv-store/
  expect "follower says what it is" "200 {\"result\":\"Success\",$relays}" follower GET /kv-store
  expect "key count of an empty store" "${COUNTED}0}" main GET key-count
  expect "a follower of a follower relays" "$MADE" second PUT two -d val=3
  expect "key count through a follower" "${COUNTED}1}" follower GET key-count
  goes second two
}

metric() { # INSTANCE NAME{LABELS}: without kv_store_
  curl -s "${url[$1]}/metrics" | awk -v name="$2" '$1 == name || $1 == "kv_store_" name { print $2 }'
}
test_metrics() {
  local before puts='verb="PUT"'
  check "a type of their own" "200 text/plain; version=0.0.4" "$(ask main GET /metrics | cut -d ' ' -f 1-3)"
  expect "a verb that they do not take" "$NO_VERB" main PUT /metrics -d val=1
  check "each has its help and type" 0 "$(curl -s "${url[main]}/metrics" | awk '
    $1 == "#" { known[$3]++; next }
    { sub(/(_(bucket|sum|count))?({.*)?$/, "", $1); if (known[$1] != 2) wrong++ }
    END { print wrong + 0 }')"
  before=$(counted)
  ask main PUT metric -d val=123 >/dev/null
  ask follower PUT metric -d val=12345 >/dev/null
  ask main PUT metric >/dev/null
  # Relays, none of which failed; requests, but not those of a follower's clients; keys and the bytes of their values;
  # how long requests took.
  check "what they count" "1 0 1 1 1 7 2 2" "$(paste <(counted) <(echo "$before") | awk '{ print $1 - $2 }' | xargs)"
  goes main metric
  check "what is deleted counts no more" "$(sed -n 5,6p <<<"$before")" "$(counted | sed -n 5,6p)"
  check_that "connections, of which this is one" "$(metric main connections) > $IDLE_CLIENTS"
  check "the version" 1 "$(metric main "build_info{version=\"$VERSION\"}")"
  plausible process_start_time_seconds $(($(date +%s) - 3600)) $(($(date +%s) + 1))
  plausible process_resident_memory_bytes $(($(status_field main VmRSS) * 512)) $(($(status_field main VmRSS) * 2048))
  plausible "request_duration_seconds_sum{$puts}" 0 "$(metric main "request_duration_seconds_count{$puts}")"
  check "durations: no bucket counts less than the one before" "7 0" "$(curl -s "${url[main]}/metrics" |
    awk '/^kv_store_request_duration_seconds_bucket{verb="PUT"/ { count++; fell += $2 < last; last = $2 }
      END { print count + 0, fell + 0 }')"
}
plausible() { # NAME{LABELS} LEAST MOST
  check "$1 is plausible" yes "$(metric main "$1" | awk -v least="$2" -v most="$3" \
    '{ print ($1 > least && $1 <= most) ? "yes" : $1 " is not from " least " to " most }')"
}
counted() {
  local name put='verb="PUT"'
  for name in relays_total relay_failures_total; do metric follower "$name"; done
  for name in "requests_total{$put,class=\"2xx\"}" "requests_total{$put,class=\"4xx\"}" keys value_bytes \
    "request_duration_seconds_count{$put}" "request_duration_seconds_bucket{$put,le=\"+Inf\"}"; do
    metric main "$name"
  done
}

# The same questions to main and to a follower: answers are compared byte by byte, with all of their heads but the date.
test_follower_is_no_different() {
  local path question before
  for path in /kv-store/{same,keys/same,key-count,view-change,a/b,'same?val=2'} /; do
    for question in '' '-I' '-X PUT -d val=1' '-X PUT' '-X PUT -d val=%ff' '-X DELETE' '-X POST' '-X OPTIONS' \
      '-H Content-Type:application/json -X PUT -d {}'; do
      for before in '-X PUT -d val=1' '-X DELETE'; do
        check "$question $path after $before" "$(answer_after "$before" main "$question" "$path")" \
          "$(answer_after "$before" follower "$question" "$path")"
      done
    done
  done
  status_of main DELETE same >/dev/null
}
answer_after() { # CURL-ARGUMENTS-BEFORE INSTANCE CURL-ARGUMENTS PATH
  # shellcheck disable=SC2086 # arguments are words
  curl -s -o /dev/null $1 "${url[main]}/kv-store/same" && curl -s -i $3 "${url[$2]}$4" | grep -v ^Date
}

test_main_paused() { # main instances that do not answer: one that is paused, and one that asks its follower
  local crowd fd line='' began
  act pause main
  at_once 200 timed follower &
  crowd=$!
  poll 30 test -e "$work/at_once.200"
  check "the follower itself answers at once beside 200 waiting clients" 10 \
    "$(timed follower '?[1-10]' | awk '$1 == 200 && $2 < 0.5' | wc -l)"
  check_that "the follower's threads are bounded" "$(status_field follower Threads) < 100"
  connect follower
  printf 'GET %s HTTP/1.1\r\nHost: test\r\n\r\n' /kv-store /kv-store/foo >&"$fd"
  IFS= read -r -t 2 line <&"$fd"
  check "an answer does not wait for the next one" "HTTP/1.1 200 OK" "${line%$'\r'}"
  exec {fd}>&-
  wait "$crowd"
  check "every client gets the error, within 5 s" "200 501" \
    "$(output | awk '{ print $1 ($2 > 5.4 ? " late" : "") }' | sort | uniq -c | xargs)"
  expect "the error in JSON" "${MAIN_DOWN/GET/DELETE}" follower DELETE keys/foo
  act resume main
  expect "resumed: the next request works" "$NO_KEY" follower GET foo
  place ring1 ring2
  start ring1 FORWARDING_ADDRESS="${address[ring2]}"
  start ring2 MAINIP="${address[ring1]}"
  began=$(now)
  expect "a ring of followers answers the error" "$NO_MAIN" ring1 PUT foo -d val=1
  check_that "... and is told apart from a main instance that hangs (ms)" "$(now) - $began < 2500"
}

# ---- Settings --------------------------------------------------------------------------------------------------------

# refused STATUS "SETTING..." [NAMED]: the program ends with the status and one line that has NAMED (if it is not given,
# the first setting) and nothing secret.
refused() {
  local named=${3:-${2%% *}}
  check "$2" "1 line, status $1" "$("run_$where" "$2" | grep -v sesame | sed "s|.*$named.*|1 line,|" | paste -sd' ')"
}
test_settings() {
  local wrong
  for wrong in PORT=abc PORT=65536 PORT=0 PORT=+1 IP=localhost FORWARDING_ADDRESS=nohost ADDRESS=:8080 VIEW=a:1,b:1 \
    FORWARDING_ADDRESS=http://main:8080 MAINIP=main:http 'VIEW=a:1 ADDRESS=a:1 FORWARDING_ADDRESS=b:1' \
    'REPL_FACTOR=1 ADDRESS=a:1 FORWARDING_ADDRESS=b:1' 'VIEW=a:1,b ADDRESS=a:1' 'VIEW=a:1,A:1 ADDRESS=a:1'; do
    refused 2 "$wrong"
  done
  refused 1 IP=192.0.2.1 # which this machine does not have
  refused 2 SECRET=sesame SECRET=
  refused 2 'ADDRESS=a:1 SECRET=sesame-ö' SECRET=
  place ported
  start ported PORT= ADDRESS="${address[ported]}"
  check "without PORT, that of ADDRESS" 200 "$(status_of ported GET /kv-store)"
  act kill ported
  check "an argument that is none" "status 2" "$("run_$where" '' --nonsense | tail -n 1)"
  check "--version" "kv-store $VERSION status 0" "$("run_$where" '' --version | xargs)"
  check "--help names the settings" "status 0 7" "$("run_$where" '' --help | awk '
    /^  (PORT|IP|FORWARDING_ADDRESS|MAINIP|ADDRESS|VIEW|SECRET) / { n++ }
    /^status/ { print $0, n }')"
  if [ "$where" = process ]; then
    refused 1 "PORT=${address[main]#*:} IP=127.0.0.1" # which is in use
    check "too few files for 100 connections" "1 line, status 1" "$( (ulimit -n 499 && run_process '') |
      sed 's|.*ulimit -n 499: expected 500 or more.*|1 line,|' | paste -sd' ')"
  fi
}

inspect_image() { docker image inspect -f "{{$1}}" "$image"; } # MEMBER
test_image() {
  check_that "the image is under 3 MB (bytes)" "$(inspect_image .Size) < 3000000"
  check "the image's health check passes" "status 0" "$(health_container main)"
  check "the image says which port it serves" 'map[8080/tcp:{}]' "$(inspect_image .Config.ExposedPorts)"
}

# ---- A store of several nodes ----------------------------------------------------------------------------------------

view() { # NODE...: their addresses, separated by commas. addresses NODE...: a JSON array of them, sorted.
  local node list=()
  for node in "$@"; do list+=("${address[$node]}"); done
  (IFS=, && echo "${list[*]}")
}
addresses() { view "$@" | jq -R -c 'split(",") | sort'; }
# change NODE MEMBERS: asks a node for a view change with these members of a JSON object.
change() { ask "$1" PUT view-change -d "{$2}"; }
change_to() { change "$1" "\"view\":\"$(view "${@:2}")\""; }                    # ASKED NODE...
force_to() { change "$1" "\"view\":\"$(view "${@:2}")\",\"force\":true"; }      # ASKED NODE...
factor_to() { change "$2" "\"view\":\"$(view "${@:3}")\",\"repl-factor\":$1"; } # FACTOR ASKED NODE...
status_of_change() { change_to "$@" | code; }
moved() { member .moved; } # of the answer of a view change, like the next one
shards() { member '[.shards[]."key-count"] | join(" ")'; }
# put NODE KEY VALUE [CONTEXT]: prints the answer. get NODE KEY [CONTEXT].
put() { ask "$1" PUT "keys/$2" -d "{\"value\":\"$3\"${4:+,\"causal-context\":$4}}"; }
get() { ask "$1" GET "keys/$2" ${3:+-d "{\"causal-context\":$3}"}; }
# expect_puts WHAT COUNT ANSWER NODE KEYS VALUE / expect_gets WHAT COUNT VALUE NODE KEYS: what each of the keys gets.
expect_puts() { check_all "$1" "$2" "$3" "$(put "${@:4}")"; }
expect_gets() { expect_all "$1" "$2" "$(json_value "\"$3\"")" "$4" GET "keys/$5"; }
# write NODE PREFIX COUNT / found NODE PREFIX COUNT: puts keys; says how many are there, with their values.
write() { put "$1" "$2[1-$3]" "of $2" | grep -c '^20[01]'; }
found() { get "$1" "$2[1-$3]" | grep -c "\"value\":\"of $2\""; }
deleted() { ask "$1" DELETE "keys/$2" | grep -c Deleted; } # NODE KEYS: how many of them have gone
# field FILTER NODE: of what a node says of itself.
field() { ask "$2" GET /kv-store | member "$1"; }
view_of() { field '.view | join(",")' "$1"; }
# (Whatever an image calls it: that is a check of its own.)
count() { ask "$1" GET key-count | member '."key-count" // first(.[] | numbers)'; }
each() { # COMMAND NODE...: what it prints for each of them, on one line
  local node
  for node in "${@:2}"; do "$1" "$node"; done | paste -sd' '
}
counts() { each count "$@"; }
sum() { awk '{ for (n = 1; n <= NF; n++) total += $n } END { print total + 0 }'; }
total() { counts "$@" | sum; }
# balanced: whether any two of the counts differ by one at most. roughly_balanced NODE...: from half to twice the mean.
balanced() { jq -s -r 'if max - min <= 1 then "balanced" else "not balanced" end'; }
roughly_balanced() {
  counts "$@" | jq -s -r --argjson nodes $# '(add / $nodes) as $mean | if length == $nodes and min * 2 >= $mean
    and max <= $mean * 2 and max > 0 then "balanced" else "keys: \(map(tostring) | join(" "))" end' 2>/dev/null
}
# agreement NODE...: "agreed" if all have the same view.
agreement() { each view_of "$@" | xargs -n 1 | sort -u | xargs | sed 's/^[^ ]*$/agreed/'; }
# owners NODE: of 120 keys, how many come with which address. owners_expected OTHER: as many as it has, with its own.
owners() { get "$1" '[a-b][1-60]' | grep '^200' | member '.address // "none"' | sort | uniq -c | xargs; }
owners_expected() {
  local held
  held=$(count "$1")
  printf '%s\n' "$held ${address[$1]}" "$((120 - held)) none" | sort -k 2 | paste -sd' '
}

test_shards() { # what every store of several nodes does
  local answer
  start_store "n1 n2"
  on "n1 n2" later expect_all "NODE is ready, and has no such key" 1 "$(no_such_key GET)" NODE GET keys/none
  expect_puts "60 keys are put through n1" 60 "$ADDED" n1 'a[1-60]' 'of a'
  expect_puts "60 keys are put through n2" 60 "$ADDED" n2 'b[1-60]' 'of b'
  on "n1 n2" expect_all "NODE says how many keys it has" 1 "$COUNTED\"(any)\"}" NODE GET key-count
  on "n1 n2" expect_gets "NODE finds the keys that n1 took" 60 'of a' NODE 'a[1-60]'
  on "n1 n2" expect_gets "NODE finds the keys that n2 took" 60 'of b' NODE 'b[1-60]'
  check "the key counts add up" 120 "$(total n1 n2)"
  check "the keys are on both nodes, roughly balanced" balanced "$(roughly_balanced n1 n2)"
  check "n1 gives n2's address with n2's keys, and none with its own" "$(owners_expected n2)" "$(owners n1)"
  check "n2 gives n1's address with n1's keys, and none with its own" "$(owners_expected n1)" "$(owners n2)"
  expect_puts "n2 replaces the values of all that n1 took" 60 "$UPDATED" n2 'a[1-60]' 'new'
  expect_gets "... and n1 finds the new ones" 60 'new' n1 'a[1-60]'
  expect_all "PUT without a value" 1 "$MISSING" n1 PUT keys/a1 -d '{}'
  expect_all "PUT with a key of 51 characters" 1 "$LONG_KEY" n1 PUT "keys/$(letters 51 k)" -d '{"value":1}'
  expect_all "n1 deletes 10 of the keys that n2 took" 10 "$REMOVED" n1 DELETE 'keys/b[51-60]'
  expect_all "... which n2 does not find any more" 10 "$(no_such_key GET)" n2 GET 'keys/b[51-60]'
  expect_all "... and cannot delete again" 10 "$(no_such_key DELETE)" n2 DELETE 'keys/b[51-60]'
  check "the key counts add up after the deletions" 110 "$(total n1 n2)"
  expect_puts "n1 makes them again" 10 "$ADDED" n1 'b[51-60]' 'of b'
  # A third node joins. Afterwards they have 120 keys.
  place n3
  start_node n3 VIEW="$(view n1 n2 n3)"
  # A node that the others do not list relays. A change would have to be tried again until it does.
  if "$strict"; then await "n3 goes by the table of the others" 0.0 field '."table-version"' n3; fi
  answer=$(change_to n1 n1 n2 n3)
  check_within "a view change adds n3" "$CHANGED" "$answer"
  told "its answer has the addresses of all nodes" '[.shards[].address] | sort' "$(addresses n1 n2 n3)" "$answer"
  told "its answer has their key counts" '[.shards[]."key-count"] | sort' "$(counts n1 n2 n3 | jq -sc sort)" "$answer"
  check "the key counts of the three nodes add up" 120 "$(total n1 n2 n3)"
  check "the keys are on all three nodes, roughly balanced" balanced "$(roughly_balanced n1 n2 n3)"
  on "n1 n2 n3" expect_gets "after the view change NODE finds the keys that n1 took" 60 'new' NODE 'a[1-60]'
  on "n1 n2 n3" expect_gets "after the view change NODE finds the keys that n2 took" 60 'of b' NODE 'b[1-60]'
  expect_puts "after the view change n3 takes new keys" 10 "$ADDED" n3 'c[1-10]' 'of c'
  expect_gets "... which n1 finds" 10 'of c' n1 'c[1-10]'
  expect_all "... and deletes" 10 "$REMOVED" n1 DELETE 'keys/c[1-10]'
}

test_nodes() { # what this project promises besides. Continues with 120 keys on n1, n2 and n3.
  local itself id second three
  start_node n4
  three=$(view n1 n2 n3)
  check "n1 is healthy" "status 0" "$("health_$where" n1)"
  itself='"shard-id":"1","repl-factor":1,"table-version":"0.1","incoming":[],"silent":[]}'
  itself="\"address\":\"${address[n1]}\",\"view\":[\"${three//,/\",\"}\"],\"key-count\":40,$itself"
  itself="200 {\"result\":\"Success\",\"role\":\"node\",\"version\":\"$VERSION\",$itself"
  await "n1 says what it is" "$itself" ask n1 GET /kv-store
  check "every node has the view" "$three $three $three" "$(each view_of n1 n2 n3)"
  check "the form vocabulary has no address" 0 "$(ask n1 GET '[a-b][1-60]' | grep -c address)"
  check "errors of the owner are passed on, with its address" 40 \
    "$(ask n1 PUT 'keys/[a-b][1-60]' -d '{}' | grep -c "Value is missing.*${address[n2]}")"
  expect_all "a relayed key may be odd: PUT" 1 "$ADDED" n1 PUT keys/.. --path-as-is -d '{"value":1}'
  expect_all "... GET" 1 "$(json_value 1)" n1 GET keys/.. --path-as-is
  (printf '{"value":1' && letters 4194293 ' ' && printf '}') >"$work/padded"
  check "a body of 4 MiB is taken" 201 "$(status_of n1 PUT keys/padded -d "@$work/padded")"
  check "... through another node" 200 "$(status_of n2 PUT keys/padded -d "@$work/padded")"
  goes n1 .. padded
  expect "shards: all of them" "${SHARDS}[\"1\",\"2\",\"3\"]}" n3 GET shards
  second="${SHARD}\"2\",\"key-count\":40,\"replicas\":[\"${address[n2]}\"]}"
  on "n1 n2" expect "shards: one, asked through NODE" "$second" NODE GET shards/2
  for id in 0 4 02 +2 x ''; do
    expect "shards: no shard '$id'" "$(json_error 404 'Shard does not exist' GET)" n1 GET "shards/$id"
  done
  expect "shards: a verb that they do not take" "$(json_error 405 'Method not allowed')" n1 PUT shards -d val=1
  expect "the count says whose it is" "${COUNTED}40,\"shard-id\":\"3\"}" n3 GET key-count
  check "log: which table it adopts, and when it has everything" "1 1" "$("log_$where" n3 |
    awk '/goes by table 0.1 of 3 nodes, fetches from .*:/ { adopted++ } /has everything of table 0.1/ { whole++ }
      END { print adopted, whole }')"
}
test_view_changes() {
  check "the same view again moves nothing" 0 "$(change_to n3 n1 n2 n3 | moved)"
  check "one leaves, one joins, as a JSON array: 40 keys move" 40 \
    "$(change n2 "\"view\":[\"${address[n4]}\",\"${address[n3]}\",\"${address[n2]}\"]" | moved)"
  check "... the counts" "0 40 40 40" "$(counts n1 n2 n3 n4)"
  expect "... the one that left has no shard" "${COUNTED}0}" n1 GET key-count
  check "... it relays" "60 60" "$(get n1 'a[1-60]' | grep -c new) $(found n1 b 60)"
  shard() { tr "'" '"' <<<"{'shard-id':'$1','address':'$(view "n$1")','replicas':['$(view "n$1")'],'key-count':30}"; }
  check "... and can be asked for a view change: the answer, to the byte" \
    "${CHANGED%\}},\"moved\":30,\"shards\":[$(shard 1),$(shard 2),$(shard 3),$(shard 4)]}" "$(change_to n1 n1 n2 n3 n4)"
  check "50 keys go" 50 "$(deleted n3 'a[1-50]')"
  check "... and the same view evens out what drifted" "balanced 70" \
    "$(change_to n2 n1 n2 n3 n4 | shards | balanced) $(total n1 n2 n3 n4)"
  check "down to one node" "70 70 0 0 0" "$(change_to n4 n1 | shards) $(counts n1 n2 n3 n4)"
  check "... and up to two" "35 35" "$(change_to n4 n1 n2 | shards)"
  check "... and back to three" "balanced 70" "$(change_to n1 n1 n2 n3 | shards | balanced) $(total n1 n2 n3)"
  check "all keys go" "70 0" "$(deleted n2 '[a-b][1-60]') $(total n1 n2 n3)"
}

# refused_change WHAT STATUS ERROR MEMBERS
refused_change() { check "$1" "$(json_error "$2" "$3")" "$(change n1 "$4")"; }
test_refused_view_changes() {
  local before alias three invalid='View is not valid:' another='holds keys of another store'
  three="\"view\":\"$(view n1 n2 n3)"
  before=$(view_of n1; counts n1 n2 n3)
  expect "no body" "$(json_error 400 'View is missing')" n1 PUT view-change
  expect "not JSON" "$NO_OBJECT" n1 PUT view-change -d 'view'
  refused_change "no view" 400 'View is missing' ''
  refused_change "an address that is none" 400 "$invalid 'n1' is not host:port" '"view":"n1"'
  refused_change "an address given twice" 400 "$invalid a:1 is given twice" '"view":"a:1,a:1"'
  refused_change "an empty view" 400 "$invalid '' is not host:port" '"view":""'
  refused_change "a view that is a number" 400 "$invalid it is neither a string nor an array of strings" '"view":1'
  refused_change "a force" 400 "$invalid force is 'true', neither true nor false" "$three\",\"force\":\"true\""
  refused_change "a node that is not there" 503 'Node 127.0.0.1:1 is down' "$three,127.0.0.1:1\""
  start_node other && start_node fellow
  await "(another store has a key)" 201 status_of other PUT key -d val=1
  refused_change "a node with keys of another store" 409 "Node ${address[other]} $another" "$three,${address[other]}\""
  check "... which keeps them" "200 $(view other)" "$(status_of other GET key) $(view_of other)"
  check "(the other store grows)" "1 0" "$(change_to other other fellow | shards)"
  refused_change "one that goes on without it" 409 "Node ${address[fellow]} $another" "$three,${address[fellow]}\""
  alias=localhost:${address[n4]##*:}
  [ "$where" = process ] || alias=${ip[n4]}:$served
  refused_change "a node by another name than its own" 503 "Node $alias is down" "$three,$alias\""
  # Whoever names dead nodes gets an error, however many, and the node goes on.
  at_once 50 change n1 "\"view\":\"$(view n1)$(printf ',127.0.0.1:%d' {1..999})\""
  check "1,000 dead nodes, 50 times at once: errors" 50 "$(output | code | grep -c -x -E '503|409')"
  check_that "its threads are bounded" "$(status_field n1 Threads) < 100"
  check "nothing has changed" "$before" "$(view_of n1; counts n1 n2 n3)"
}

ask_on_stream() { # INSTANCE REQUEST: opens a stream and asks one thing on it; prints the error that is the answer
  local fd answers
  open_stream "$1" && question "$2" >&"$fd"
  timeout 20 grep -a -m 1 -o '{"result":"Error".*' <&"$answers" || echo "no answer"
  exec {fd}>&- {answers}>&-
}
answers_head() { # INSTANCE: its status to who opens a stream, and how it proves then that it knows the secret
  curl -s -m 1 -o /dev/null -D - -H "$STREAM" "${@:2}" \
    "${url[$1]}/kv-store?stream=7" | tr -d '\r' | grep -i -E '^(HTTP|Authentication-Info)'
}
test_secret() {
  local message='\0\0\0\0\x02\x08nonsense' refused='{"result":"Error","msg":"Not a node of this store"}'
  start_store "s1 s2" SECRET=open-sesame
  start_node s3 SECRET=open-barley && start_node s4 && start apart FORWARDING_ADDRESS="${address[s1]}"
  check "who knows it is a node" "20 20" "$(write s1 k 20) $(found s2 k 20)"
  check "a follower does not need it" "20 20" "$(write apart l 20) $(found apart l 20)"
  check "who has another does not join" "$(json_error 503 "Node ${address[s3]} is down")" "$(change_to s1 s1 s2 s3)"
  check "who has none does not take part in a change" 503 "$(status_of_change s4 s1 s2 s4)"
  check "a message without" "$refused" "$(ask_on_stream s1 "$message")"
  check "a message where there is no secret, but it is none" "${BAD#* }" "$(ask_on_stream n1 "$message")"
  check "a question that is none" "no answer" "$(ask_on_stream n1 nonsense)"
  check "a stream without a number" 405 "$(status_of n1 POST /kv-store -H "$STREAM" -d '')"
  check "a proof that is none" "HTTP/1.1 403 Forbidden" "$(answers_head s1 -H 'Authorization: Bearer open-sesame')"
  check "nothing is proven to who proves nothing" "HTTP/1.1 200 OK" "$(answers_head s1)"
  check "the view has not changed" "$(view s1 s2)" "$(view_of s1)"
  check "it is not printed" "" "$(each "log_$where" s1 s2 s3 s4 | grep -E 'open-|sesame|barley')"
}

# Writers put, replace and delete through all nodes, and a reader reads, while nodes join and leave.
test_writers_during_changes() {
  local round bad=0 crowd before along
  before=$(total n1 n2 n3 n4)
  write n1 r 100 >/dev/null
  at_once 4 write_through &
  crowd=$!
  all_along read_keys
  for round in 'n1 n2 n3 n4' 'n2 n4' 'n1 n2 n3' 'n3' 'n4 n3 n2 n1' 'n1 n2 n3'; do
    # shellcheck disable=SC2086 # a round is a list of nodes
    [ "$(status_of_change "n$((RANDOM % 4 + 1))" $round)" = 200 ] || bad=$((bad + 1))
    sleep 0.1 # for the clients
  done
  wait "$crowd"
  enough
  check "every view change is done" 0 "$bad"
  check "no read failed meanwhile, none took a second" "" "$(awk '$1 != 200 || $2 > 1' "$work/along")"
  check_that "(there were some reads)" "$(wc -l <"$work/along") > 100"
  check "(their keys go)" 100 "$(deleted n1 'r[1-100]')"
  check "no write failed: put, put, deleted" "40 40 20 40 40 20 40 40 20 40 40 20" "$(output | xargs)"
  check "what was acknowledged is there" "20 20 20 20" "$(each found_of_writer 1 2 3 4)"
  check "each key is on one node" "$((before + 80))" "$(total n1 n2 n3 n4)"
  at_once 8 change_as_rival
  check "rivals: each is done, or told that another change is in progress" 200 \
    "$(output | code | sort -u | xargs | sed 's/ 409$//')"
  await "... all agree in the end" agreed agreement n1 n2 n3 n4
  check "... no key is lost" "20 20 20 20 $((before + 80))" "$(each found_of_writer 1 2 3 4) $(total n1 n2 n3 n4)"
  check "... (back to three)" 200 "$(status_of_change n1 n1 n2 n3)"
}
change_as_rival() { # NUMBER
  local nodes=(n3 n2 n1)
  if (($1 % 2)); then nodes=(n1 n2 n3 n4); fi
  change_to "n$(($1 % 3 + 1))" "${nodes[@]}"
}
read_keys() { timed "n$(($1 % 4 + 1))" 'keys/r[1-100]'; } # NUMBER: through one of the nodes
found_of_writer() { found n1 "w$1_" 40; } # NUMBER
write_through() { # NUMBER: puts 40 keys, replaces them, deletes the first 20
  write "n$1" "w$1_" 40
  write "n$(($1 % 4 + 1))" "w$1_" 40
  deleted "n$((5 - $1))" "w$1_[1-20]"
}

# keys_of NODE ASKED: asks one node for all keys that there may be; prints those that another one answers for. Many at a
# time: each question about a key of a node that is gone takes as long as a connection may.
keys_of() {
  local answers="$work/answers_of_$1"
  rm -rf "$answers"
  curl -sZ -m 40 --parallel-max 50 --create-dirs "${url[$2]}/kv-store/keys/e[1-300]" -o "$answers/e#1" \
    "${url[$2]}/kv-store/keys/w[1-4]_[1-40]" -o "$answers/w#1_#2" 2>/dev/null
  grep -rl "\"doesExist\":true.*\"address\":\"${address[$1]}\"" "$answers" | sed 's/.*\///' | sort
}
keys_of_all() { (keys_of n1 n2 && keys_of n2 n3 && keys_of n3 n1) | sort; }

test_node_paused() {
  local all keys lost gone
  all=$(total n1 n2 n3)
  keys=$(keys_of n1 n3)
  lost=$(keys_of n2 n1 | head -n 1)
  gone=$(json_error 503 "Node ${address[n2]} is down" GET)
  check "(keys that n1 has)" "$(count n1)" "$(wc -l <<<"$keys")"
  act pause n2
  expect "its own keys are not to be had" "${gone%\}},\"address\":\"${address[n2]}\"}" n1 GET "keys/$lost"
  expect "... in the form vocabulary" "$NO_MAIN" n3 DELETE "$lost"
  await "another says who is silent" "${address[n2]}" field '.silent | join(",")' n1
  check "... and counts it" 1 "$(metric n1 silent_nodes)"
  check "a view change is refused, soon" "${gone/GET/PUT}" "$(patience=5 change_to n1 n1 n2 n3 n4)"
  check "the others keep the view" "$(view n1 n2 n3) $(view n1 n2 n3)" "$(each view_of n1 n3)"
  check "their keys are found" "$keys" "$(keys_of n1 n3)"
  act resume n2
  await "resumed: no key moved" "$all" total n1 n2 n3
  check "resumed: a view change works" 200 "$(status_of_change n1 n1 n2 n3 n4)"
}
test_killed_in_a_view_change() {
  local n change
  for n in 1 2 3; do
    change_to n1 n1 n2 n3 >/dev/null &
    change=$!
    sleep "0.00$n" # is when in the change it is killed
    act kill n4
    wait "$change"
    await "the living nodes agree on a view" agreed agreement n1 n2 n3
    # What had been copied from the dead node, but not yet dropped there, is to be had only after that was given up.
    keys_of_all >"$work/before"
    check "it is given up by force" 200 "$(force_to n1 n1 n2 n3 | code)"
    check "... the rest are balanced" balanced "$(counts n1 n2 n3 | balanced)"
    keys_of_all >"$work/after"
    check "every key that a living node has is found" "$(total n1 n2 n3)" "$(wc -l <"$work/after")"
    check "... and none is lost that was found before" "" "$(comm -23 "$work/before" "$work/after")"
    restart n4
    await "restarted: it is on its own" "$(view n4)" view_of n4
    check "restarted: it joins again" 200 "$(status_of_change n1 n1 n2 n3 n4)"
    check "... balanced" balanced "$(counts n1 n2 n3 n4 | balanced)"
  done
}
# Nodes that were away, or that know nothing, must not go by what they know while others know better.
test_stale_nodes() {
  local all n sleeper three
  three=$(view n1 n2 n3)
  change_to n1 n1 n2 n3 >/dev/null
  act kill n3
  check "without force a dead node holds up a view change" 503 "$(status_of_change n1 n1 n2)"
  check "with force it is given up" 200 "$(force_to n1 n1 n2 | code)"
  start_node n3 VIEW="$three"
  check "a node with an old view relays by the new one" "201 0" "$(put n3 stale 1 | code) $(count n3)"
  check "... and says so" "$(view n1 n2)" "$(view_of n3)"
  change_to n1 n1 n2 n3 >/dev/null
  act pause n3
  check "asleep: it is given up" 200 "$(force_to n1 n1 n2 | code)"
  put n1 stale 2 >/dev/null
  act resume n3
  told "awake: every answer is the others'" .value '"2"' "$(get n3 stale)"
  await "awake: it holds no keys" 0 count n3
  change_to n1 n1 n2 n3 >/dev/null
  all=$(keys_of n3 n1)
  act kill n1 && act kill n2
  start_store "n1 n2"
  await "all nodes of the first view take up the present one" "$three $three" each view_of n1 n2
  check "... and what the third one has is still there" "$all" "$(keys_of n3 n1)"
  check "60 new keys through one of them" 60 "$(write n2 e 60)"
  check "... are found through the others" "60 60" "$(found n1 e 60) $(found n3 e 60)"
  act kill n2
  start_node n2
  await "a node without a VIEW takes up the present one" "$three" view_of n2
  check "... and answers for its keys" 60 "$(write n2 e 60)"
  for n in 1 2 3; do
    (sleep "0.0$n" && act pause n2 && sleep 0.3 && act resume n2) & # is when it is paused, and for how long
    sleeper=$!
    check "paused in a view change: it is done, or refused" 200 "$(status_of_change n1 n1 n2 n3 n4 | sed 's/503/200/')"
    wait "$sleeper"
    await "... all agree" agreed agreement n1 n2 n3
    await "... no key is lost" 60 found n3 e 60
    await "... (back)" 200 status_of_change n3 n1 n2 n3
  done
}

test_first_views() {
  local kept early
  place u1 u2 u3 e1 e2
  start_node u3 VIEW="$(view u1 u2 u3)"
  start_store "u1 u2"
  check "the node that the others do not list relays" "60 60 0" "$(write u3 g 60) $(found u1 g 60) $(count u3)"
  check "the others share the keys" 60 "$(total u1 u2)"
  kept=$(count u1)
  start_node u4
  act kill u2
  check "force, asked of the node that joins: done at once" 200 "$(force_to u4 u1 u4 | code)"
  check "... what a living node had is there" "$kept" "$(total u1 u4)"
  start_node e1 VIEW="$(view e1 e2)"
  check "a node that cannot answer for keys is not healthy" "status 1" "$("health_$where" e1)"
  poll 60 put_early >"$work/early" &
  early=$!
  start_node e2 VIEW="$(view e1 e2)"
  wait "$early"
  check "a request before the last node is up waits, or is told that it is down" 201 "$(code <"$work/early")"
  await "... and both answer for their keys" 1 deleted e2 early
  check "the empty store shrinks to one node" 0 "$(change_to e1 e1 | shards)"
  check "... and grows again" "0 0" "$(change_to e1 e1 e2 | shards)"
  start_node one && start_node blank
  await "(a store of one has a key)" 201 status_of one PUT key -d val=1
  check "a node without keys may be asked to join it" 200 "$(status_of_change blank blank one)"
  check "... and the key is found through it" 200 "$(status_of blank GET key)"
}
put_early() { put e1 early 1 | grep -v ^503; }

# ---- Several replicas ------------------------------------------------------------------------------------------------

UNABLE=$(json_error 400 'Unable to satisfy request' GET)
context_of() { member '."causal-context" // {}' <<<"$1" || echo '{}'; } # ANSWER
# replicas_of COUNT: the nodes in so many shards, as r1 tells them, sorted. sizes_of COUNT: how many keys are in them.
replicas_of() { ask r1 GET "shards/[1-$1]" | member '.replicas[]' | jq -R -s -c 'split("\n")[:-1] | sort'; }
sizes_of() { ask r1 GET "shards/[1-$1]" | member '."key-count" // first(.[] | numbers)' | sum; }
same_count() { counts "$@" | awk '{ print $1 != "" && $1 == $2 ? "the same" : "counts: " $0 }'; } # NODE OTHER
answers_itself() { # NODE: "as many" if it adds no address to the answers for as many keys as it has
  local own held
  own=$(get "$1" '[a-b][1-60]' | grep '^200' | grep -v -c '"address"')
  held=$(count "$1")
  if [ "$own" = "$held" ]; then echo "as many"; else echo "$own, but it has $held"; fi
}
agree_on() { # KEY NODE...: "agreed" if all of them give the same value
  local node
  for node in "${@:2}"; do get "$node" "$1" | sed -E 's/^200 .*("value": *"[^"]*").*/\1/'; done | sort -u |
    awk '{ values = values $0 "; " } END { print NR == 1 && /^"value"/ ? "agreed" : values }'
}
# check_get WHAT VALUE NODE KEY [CONTEXT] / check_put WHAT ANSWER NODE KEY VALUE [CONTEXT]: if there is a context in the
# request, there is one in the answer. It is then in $context.
check_get() { check_context "$1" "$(json_value "\"$2\"")" "$(get "${@:3}")" "${5-}"; }
check_put() { check_context "$1" "$2" "$(put "${@:3}")" "${6-}"; }
check_context() { # WHAT ANSWER GOT CONTEXT-OF-THE-REQUEST
  local expected=$2
  if [ -n "$4" ]; then
    expected="${expected%\}},\"causal-context\":\"(any)\"}"
    context=$(context_of "$3")
  fi
  check_within "$1" "$expected" "$3"
}

# test_replicas: what every store of replicas does. First and second are the replicas of one shard, third and fourth of
# the other.
test_replicas() {
  local node id answer first=r1 second=r2 third fourth own context key
  start_store "r1 r2 r3 r4" REPL_FACTOR=2
  on "r1 r2 r3 r4" later expect_all "NODE is ready, and has no such key" 1 "$(no_such_key GET)" NODE GET keys/none
  answer=$(ask r1 GET shards)
  check_within "the shards are told" "${SHARDS%,*}}" "$answer"
  told "... there are two" '.shards | sort' '["1","2"]' "$answer"
  for id in 1 2; do
    answer=$(ask r1 GET "shards/$id")
    check_within "shard $id is told" "$SHARD\"$id\"}" "$answer"
    told "... shard $id has two replicas" '.replicas | length' 2 "$answer"
    for node in r2 r3 r4; do
      [[ $answer != *"\"${address[r1]}\""* || $answer != *"\"${address[$node]}\""* ]] || second=$node
    done
  done
  check "every node is in one shard" "$(addresses r1 r2 r3 r4)" "$(replicas_of 2)"
  read -r third fourth <<<"$(printf '%s\n' r2 r3 r4 | grep -v "$second" | xargs)"

  expect_puts "60 keys are put through r1" 60 "$ADDED" r1 'a[1-60]' 'of a'
  expect_puts "60 keys are put through r4" 60 "$ADDED" r4 'b[1-60]' 'of b'
  settle
  on "r1 r2 r3 r4" later expect_gets "NODE finds the keys that r1 took" 60 'of a' NODE 'a[1-60]'
  on "r1 r2 r3 r4" later expect_gets "NODE finds the keys that r4 took" 60 'of b' NODE 'b[1-60]'
  await "the key counts of the shards add up" 120 sizes_of 2
  await "$first and $second have the same key count" "the same" same_count "$first" "$second"
  await "$third and $fourth have the same key count" "the same" same_count "$third" "$fourth"
  on "$first $second" await "NODE answers for all keys of its shard itself, and for no others" "as many" \
    answers_itself NODE
  # Keys of the shard of first and second.
  mapfile -t own < <(get "$first" 'a[21-60]' | awk '/^200/ && !/"address"/ { print "a" NR + 20 }')
  own+=(a21 a22 a23)
  key=${own[0]}
  test_replicas_that_die
  check_put "a write without anything known gets a causal-context" "$UPDATED" "$first" "$key" caused '{}'
  check_get "$second, given it, answers with what was written, and a causal-context" caused "$second" "$key" "$context"
  [ "$where" = process ] || test_cut_network
  test_six_nodes
}

test_replicas_that_die() { # uses the variables of test_replicas, as do the next ones
  act kill "$second"
  on "$first $third $fourth" later expect_gets "$second is killed: NODE reads" 20 'of a' NODE 'a[1-20]'
  expect_puts "$second is killed: $first writes" 10 "$UPDATED" "$first" 'a[1-10]' 'killed'
  expect_puts "$second is killed: $third writes" 10 "$UPDATED" "$third" 'a[11-20]' 'killed'
  expect_puts "$second is killed: $fourth makes keys" 20 "$ADDED" "$fourth" 'c[1-20]' 'of c'
  expect_gets "$second is killed: $first finds them" 20 'of c' "$first" 'c[1-20]'
  restart "$second"
  later expect_gets "$second is started again: it finds what was written" 20 'killed' "$second" 'a[1-20]'
  later expect_gets "$second is started again: it finds what was made" 20 'of c' "$second" 'c[1-20]'
  await "$second is started again: it has as many keys as $first" "the same" same_count "$first" "$second"
  act kill "$first"
  later expect_gets "$first is killed then: $second has what was written" 20 'killed' "$second" 'a[1-20]'
  later expect_gets "$first is killed then: $third finds it too" 20 'killed' "$third" 'a[1-20]'
  restart "$first"
  await "$first is started again: it has as many keys as $second" "the same" same_count "$first" "$second"
}

# second is cut off from all others, and clients reach both sides. Where we are strict, what this project promises
# besides.
test_cut_network() {
  local seen began
  act cut "$second"
  later expect_gets "$second is cut off: $third reads" 20 'of c' "$third" 'c[1-20]'
  later check_get "$second is cut off: it reads a key of its shard" caused "$second" "$key"
  check_put "$second is cut off: $first writes" "$UPDATED" "$first" "$key" unseen "$context"
  seen=$context
  check_get "$second is cut off: $third reads what $first wrote" unseen "$third" "$key" "$seen"
  began=$(now)
  check_within "$second is cut off: it answers with no less than was seen" "$UNABLE" "$(get "$second" "$key" "$seen")"
  if "$strict"; then check_that "... within a second (ms)" "$(now) - $began < 1500"; fi
  check_put "$second is cut off: it writes another key of its shard" "$UPDATED" "$second" "${own[1]}" alone
  check_get "$second is cut off: it reads what it wrote" alone "$second" "${own[1]}"
  check_put "both sides write a third key: $first" "$UPDATED" "$first" "${own[2]}" 'of first'
  check_put "both sides write a third key: $second" "$UPDATED" "$second" "${own[2]}" 'of second'
  if "$strict"; then
    check_within "it refuses a key that may depend on what it lacks" "$UNABLE" "$(get "$second" "${own[3]}" "$seen")"
    check_get "a key newer than all that the context speaks of is answered" alone "$second" "${own[1]}" "$seen"
    check_put "a write on one side" "$UPDATED" "$first" "${own[4]}" older "$seen"
    check_that "... is in the context" "${#context} > 5"
    check_put "a write that comes after what it knew of" "$UPDATED" "$second" "${own[4]}" newer "$context"
    check_get "... and is read" newer "$second" "${own[4]}" "$context"
  fi
  act heal "$second"
  later check_get "the network is whole again: $second has what $first wrote" unseen "$second" "$key" "$seen"
  later check_get "the network is whole again: $first has what $second wrote" alone "$first" "${own[1]}"
  await "the network is whole again: all agree on what both wrote" agreed agree_on "${own[2]}" r1 r2 r3 r4
  await "the network is whole again: they have the same key count" "the same" same_count "$first" "$second"
  if "$strict"; then
    on "$first $second $third" later check_get "NODE has the later value" newer NODE "${own[4]}"
    await "no context is needed any more" '{}' context_after_get "$first" "${own[4]}" "$seen"
  fi
}
context_after_get() { context_of "$(get "$@")"; } # NODE KEY CONTEXT
test_six_nodes() {
  local all
  place r5 r6
  all=$(addresses r1 r2 r3 r4 r5 r6)
  on "r5 r6" start_node NODE VIEW="$(view r1 r2 r3 r4 r5 r6)" REPL_FACTOR=2
  answer=$(factor_to 2 r1 r1 r2 r3 r4 r5 r6)
  check_within "a view change makes three shards of six nodes" "$CHANGED" "$answer"
  settle
  told "its answer has three shards" '[.shards[]."shard-id"] | sort' '["1","2","3"]' "$answer"
  told "its answer has two replicas of each" '[.shards[].replicas | length]' '[2,2,2]' "$answer"
  told "its answer has every node once" '[.shards[].replicas[]] | sort' "$all" "$answer"
  await "the six nodes are in three shards" "$all" replicas_of 3
  await "the key counts of the three shards add up" 140 sizes_of 3
  on "r1 r4 r5 r6" later expect_gets "after that NODE finds the keys that were put first" 60 'of b' NODE 'b[1-60]'
  on "r1 r4 r5 r6" later expect_gets "after that NODE finds those that came later" 20 'of c' NODE 'c[1-20]'
}

test_shards_of_several() { # what this project promises besides. Continues with the store of test_replicas.
  local answer wrong invalid
  check "six nodes are four again" 200 "$(status_of_change r1 r1 r2 r3 r4)"
  check "... 60 keys are as at first, and 20 go" "60 20" "$(write r1 a 60) $(deleted r3 'c[1-20]')"
  act kill r5 && act kill r6
  answer=$(change_to r1 r1 r2 r3 r4)
  told "two shards: they balance" '[.shards[]."key-count"]' '[60,60]' "$answer"
  told "... in the order of the view" '[.shards[].replicas[]] | sort' "$(addresses r1 r2 r3 r4)" "$answer"
  told "... without an address" '[.shards[] | has("address")]' '[false,false]' "$answer"
  check "... which the answers of another shard's node have" 60 \
    "$(get r3 '[a-b][1-60]' | grep -c -e "\"${address[r1]}\"" -e "\"${address[r2]}\"")"
  for wrong in 0 5 '"2"' 1.5 true; do
    invalid="View is not valid: repl-factor is ${wrong//\"/\'}, not a whole number from 1 to 4, the number of nodes"
    check "factor $wrong is refused" "$(json_error 400 "$invalid")" "$(factor_to "$wrong" r1 r1 r2 r3 r4)"
  done
  check "a key is deleted" "201 1" "$(put r1 z 1 | code) $(deleted r4 z)"
  check "factor 1: four shards" "30 30 30 30" "$(factor_to 1 r2 r1 r2 r3 r4 | shards)"
  check "... what was deleted is not there" "404 0" "$(get r3 z | code) $(deleted r3 z)"
  check "... and is made as a new key" "201 1" "$(put r3 z 1 | code) $(deleted r3 z)"
  check "... and it stays" "40 40 40" "$(change_to r3 r1 r2 r3 | shards)"
  check "factor 3: one shard" 120 "$(factor_to 3 r2 r1 r2 r3 r4 | shards)"
  check "... every node has every key" "120 120 120 120" "$(counts r1 r2 r3 r4)"
  check "factor 2: two shards again" "60 60" "$(factor_to 2 r4 r1 r2 r3 r4 | shards)"
  check "... nothing is lost" "60 60" "$(found r1 a 60) $(found r4 b 60)"
  check "three nodes are one shard: the keys of the other move" 60 "$(change_to r1 r1 r2 r3 | moved)"
  check "... and r4 has left" "0 120" "$(count r4) $(count r3)"
  check "... and comes back" "60 60" "$(change_to r1 r1 r2 r3 r4 | shards)"
  check "one node is one shard" 120 "$(change_to r1 r1 | shards)"
  check "... and the factor is still 2 when it grows" "60 60" "$(change_to r1 r1 r2 r3 r4 | shards)"
}

test_replicas_killed() { # a client of r3 goes on writing while other replicas are killed and started again
  local round along
  all_along write_key
  for round in r1 r4 r2 r1 r4 r2; do
    act kill "$round"
    restart "$round"
    await "$round catches up" '[]' caught_up "$round"
  done
  enough
  check_that "(there were some writes)" "$(wc -l <"$work/along") > 10"
  on "r1 r2 r4" check_output "NODE finds every acknowledged write" "$(wc -l <"$work/along")" writes_found NODE
  act kill r4
  check "a view change that keeps a dead replica is refused" 503 "$(status_of_change r1 r1 r2 r3 r4)"
  check "it leaves without force" 200 "$(status_of_change r1 r1 r2 r3)"
  check "... nothing is lost" "60 60" "$(found r1 a 60) $(found r3 b 60)"
  start_node r4
  await "... and it joins again, blank" 200 status_of_change r1 r1 r2 r3 r4
  check "... nothing is lost then" "60 60" "$(found r4 a 60) $(found r4 b 60)"
}
write_key() { [[ $(put r3 "m$1" 'of m') != 20* ]] || echo "m$1"; } # NUMBER: prints the key if its write is acknowledged
writes_found() { sed "s|.*|url = ${url[$1]}/kv-store/keys/&|" "$work/along" | curl -s -K - | grep -c '"of m"'; } # NODE
caught_up() { curl -s "${url[$1]}$prefix" | jq -c .incoming; } # NODE: "[]" when it has everything

test_replica_paused() {
  local began
  check "50 keys" 50 "$(write r1 p 50)"
  act pause r2
  began=$(now)
  check "a write waits for it once" 201 "$(put r1 slow 1 | code)"
  check "... and then nobody does" 50 "$(write r1 p 50)"
  check "deletions too" 20 "$(deleted r1 'p[1-20]')"
  check_that "(ms)" "$(now) - $began < 8000"
  check "reads through every other node" "30 30 30" "$(found r1 p 50) $(found r3 p 50) $(found r4 p 50)"
  act resume r2
  await "resumed: it has what it missed" 30 found r2 p 50
  await "resumed: ... and no more" "$(count r1)" count r2
  check "resumed: what was deleted stays deleted" 30 "$(found r1 p 50)"
}

test_contexts() {
  local context empty=',"causal-context":{}}' not_valid
  not_valid=$(json_error 400 'Causal context is not valid' GET)
  local -a with_context=("${json[@]}" -d '{"value":1,"causal-context":{}}')
  expect "{} in a healthy store" "${ADDED%\}}$empty" main PUT keys/causal "${with_context[@]}"
  on "main follower" expect "NODE: a read has it" "$(json_value 1 | sed "s/}$/$empty/")" NODE GET keys/causal \
    "${with_context[@]}"
  on "main follower" expect "NODE: without one there is none" "$(json_value 1)" NODE GET keys/causal
  on "main follower" expect "NODE: an error has it" "$(no_such_key GET | sed "s/}$/$empty/")" NODE GET keys/none \
    "${with_context[@]}"
  for context in '[]' 1 '"x"' null '{"a":1}' '{"a":"xyz"}' '{"a":"ffffffffffffffff"}' '{"a":{}}'; do
    on "main follower" check_output "NODE: $context is none of ours" "$not_valid" get NODE causal "$context"
  done
  expect "a deletion has it" "${REMOVED%\}}$empty" main DELETE keys/causal "${with_context[@]}"
  expect "a verb that no key takes has none" "$(json_error 405 'Method not allowed' POST)" main POST keys/causal \
    "${json[@]}" -d '{"causal-context":1}'
}

# ---- The bench -------------------------------------------------------------------------------------------------------
#
# Instances are processes: CPU time and memory are what the kernel says of them. What is compared is measured one right
# after the other, three times. The median counts.

readonly VIEW_KEYS=300000 MEMORY_KEYS=1000000 IDLE_NODES=10
declare -A workers=() # instance -> the processes that its clients talk to

write_wrk_script() { # wrk sends a request DEPTH times in one write. KEYNUMBER in it is one of 5,000.
  cat >"$work/wrk.lua" <<'END'
function init(args) -- VERB DEPTH [BODY]
  local type = (args[3] or ""):find("^{") and "application/json" or "application/x-www-form-urlencoded"
  local text = wrk.format(args[1], nil, { ["Content-Type"] = type }, args[3]):rep(args[2])
  wrk.format = function() return text end
  if text:find("KEYNUMBER") then
    local n = 0
    function request()
      n = (n + 1) % 5000
      return (text:gsub("KEYNUMBER", ("%09d"):format(n)))
    end
  end
end
END
}
# load CONNECTIONS DEPTH INSTANCE VERB PATH [BODY]: prints requests/s, and microseconds of CPU time of one (0 if the
# workers are not known); nothing if a request failed. (One thread of wrk would be what limits direct requests; two are
# as many as nginx has workers.)
load() {
  local before threads=$(($1 > 1 ? 2 : 1))
  before=$(cpu_time "$3")
  wrk -t "$threads" -c "$1" -d 1s -s "$work/wrk.lua" "${url[$3]}$5" -- "$4" "$2" "${@:6}" >"$work/counted" 2>&1
  awk -v cpu=$(($(cpu_time "$3") - before)) '/Socket errors|Non-2xx/ { exit } / requests in / { count = $1 }
    /^Requests\/sec/ && count { print $2, cpu / count }' "$work/counted"
}
cpu_time() { # INSTANCE: what its workers have had so far, in microseconds
  # shellcheck disable=SC2046,SC2086 # workers are words. What they are called may have spaces.
  awk -v hertz="$(getconf CLK_TCK)" '{ sub(/.*\) /, ""); sum += $12 + $13 } END { printf "%d", sum / hertz * 1e6 }' \
    /dev/null $(printf '/proc/%s/stat ' ${workers[$1]:-self})
}
# ratio CONNECTIONS DEPTH "INSTANCE VERB PATH [BODY]" "PEER VERB PATH [BODY]": "1.05 (0.95)": requests/s, and in
# brackets CPU time of a request, as multiples of those of the peer.
ratio() {
  # shellcheck disable=SC2086 # arguments are words
  for _ in {1..3}; do
    echo "$(load "$1" "$2" $3) $(load "$1" "$2" $4)"
  done | awk 'NF == 4 { print sprintf("%.2f", $1 / $3) ($4 ? sprintf(" (%.2f)", $2 / $4) : "") }' | median
}
median() { sort -g | sed -n 2p | grep . || echo error; } # of three

serve() { # NAME COMMAND...: runs another program, to be killed with the rest
  "${@:2}" >"$work/$1.log" 2>&1 &
  process[$1]=$! url[$1]=http://${address[$1]}
}
# start_nginx: what kv-store is compared with: it answers /200 itself, and relays all else to main. As in kv-store, no
# request is written to a file, and no connection is closed for having served many requests.
start_nginx() {
  place nginx
  cat >"$work/nginx.conf" <<END
daemon off; worker_processes 2; pid $work/nginx.pid; error_log stderr; user $(id -un) $(id -gn);
events { worker_connections 2048; }
http {
  access_log off; keepalive_requests 1000000000; default_type application/json;
  $(printf "%s_temp_path $work/nginx.%s; " client_body 1 proxy 2 fastcgi 3 uwsgi 4 scgi 5)
  upstream main { server ${address[main]}; keepalive 256; keepalive_requests 1000000000; }
  server {
    listen ${address[nginx]};
    location = /200 { return 200 '{"result":"Success","value":"abcdef"}\n'; }
    location / { proxy_pass http://main; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
END
  serve nginx nginx -p "$work" -c "$work/nginx.conf"
  poll 20 curl -s -o /dev/null "${url[nginx]}/200"
  workers[nginx]=$(cat "/proc/${process[nginx]}/task/${process[nginx]}/children")
}
measure_requests() {
  local asked verb clients peer=/200 n=0 path=/kv-store/bench
  start main && start follower FORWARDING_ADDRESS="${address[main]}" && start_store "n1 n2" && start_nginx
  # A key that n1 has to ask n2 for.
  until [[ $(get n1 "bench$n") == *"\"address\":\"${address[n2]}\""* ]] || [ "$n" = 100 ]; do ((n++)); done
  path+=$n
  echo '| asked | verb | 1 connection | 8 | 64 | 256 |'
  echo '| --- | --- | --- | --- | --- | --- |'
  for asked in main follower n1; do
    workers[$asked]=${process[$asked]}
    ask "$asked" PUT "$path" -d val=abcdef >/dev/null
    for verb in GET PUT; do
      printf '| %s | %s |' "$asked" "$verb"
      for clients in 1 8 64 256; do
        printf ' %s |' "$(ratio "$clients" 1 "$asked $verb $path val=abcdef" "nginx $verb $peer val=abcdef")"
      done
      echo
    done
    peer=$path
  done
  for verb in GET PUT; do
    echo "16 $verb in one write: $(ratio 64 16 "main $verb $path val=abcdef" "nginx $verb /200 val=abcdef")"
  done
  ask n1 DELETE "$path" >/dev/null
}
measure_replicas() { # three nodes with three replicas of each key, beside three with one, and three of etcd
  local put='PUT /kv-store/keys/KEYNUMBER {"value":"abcdef"}' get='GET /kv-store/keys/KEYNUMBER' peer
  start_store "one1 one2 one3" && start_store "all1 all2 all3" REPL_FACTOR=3
  poll 60 write one1 ready 1 >/dev/null && poll 60 write all1 ready 1 >/dev/null
  echo "Three replicas beside one: PUT $(ratio 64 1 "all1 $put" "one1 $put")"
  echo "Three replicas beside one: GET $(ratio 64 1 "all1 $get" "one1 $get")"
  command -v etcd >/dev/null || return 0
  start_etcd
  # Keys and values are in base64.
  peer='etcd1 POST /v3/kv/put {"key":"a2V5CgAKEYNUMBER","value":"YWJjZGVm"}'
  echo "Three replicas beside etcd: PUT $(ratio 64 1 "all1 $put" "$peer")"
  kill_process etcd1 && kill_process etcd2 && kill_process etcd3
  rm -rf "/dev/shm/$name".*
}
start_etcd() { # three nodes, their data in memory
  local n client peer
  place etcd{1..3} peer{1..3}
  for n in 1 2 3; do
    client=http://${address[etcd$n]} peer=http://${address[peer$n]}
    serve "etcd$n" etcd --name "$n" --data-dir "/dev/shm/$name.$n" --listen-peer-urls "$peer" \
      --initial-advertise-peer-urls "$peer" --listen-client-urls "$client" --advertise-client-urls "$client" \
      --initial-cluster "1=http://${address[peer1]},2=http://${address[peer2]},3=http://${address[peer3]}"
  done
  poll 20 curl -s -f -o /dev/null -d '{"key":"a2V5","value":"YWJj"}' "${url[etcd1]}/v3/kv/put"
}

fill() { # KEYS INSTANCE: puts keys of 10 bytes with values of 10 bytes
  (seq -f $'PUT /kv-store/%010.0f?val=abcdefghij HTTP/1.1\r\nHost: bench\r\n\r' "$1" && printf %s "$LAST") |
    exchange "$2" >/dev/null
  has_keys "$@"
}
has_keys() { [ "$(count "$2")" = "$1" ]; } # KEYS INSTANCE
measure_moves() { # a fourth node joins three, while a client reads; a replica starts again
  local began answer along took
  start_node n3 && start_node n4 && change_to n1 n1 >/dev/null && fill "$VIEW_KEYS" n1 || return
  change_to n1 n1 n2 n3 >/dev/null
  all_along read_keys
  began=$(now)
  answer=$(change_to n1 n1 n2 n3 n4)
  took=$(($(now) - began))
  enough
  [ "$(moved <<<"$answer") $(total n1 n2 n3 n4)" = "$((VIEW_KEYS / 4)) $VIEW_KEYS" ] || return
  echo "A view change moves $((VIEW_KEYS * 250 / took)) keys/s. The longest wait of a client meanwhile, with a new" \
    "connection each: $(awk '$2 > most { most = $2 } END { printf "%.0f", most * 1000 }' "$work/along") ms."
  factor_to 2 n1 n1 n2 >/dev/null
  kill_process n2
  began=$(now)
  restart n2
  poll 60 has_keys "$VIEW_KEYS" n2 || return
  echo "A replica that starts again fetches $((VIEW_KEYS * 1000 / ($(now) - began))) keys/s, from its start on."
}
measure_idle_store() {
  local node nodes before
  nodes=$(seq -f 'idle%.0f' -s ' ' "$IDLE_NODES")
  start_store "$nodes"
  put idle1 key 1 >/dev/null # which waits until all nodes have found one another
  for node in $nodes; do workers[idle]+=" ${process[$node]}"; done
  before=$(cpu_time idle)
  sleep 5 # is what is measured
  awk -v cpu=$(($(cpu_time idle) - before)) -v n="$IDLE_NODES" \
    'BEGIN { printf "CPU of an idle store of %d nodes: %.1f%% of one core in all.\n", n, cpu / 5e6 * 100 }'
}
measure_memory() {
  local idle=() idle_until
  start memory && start blank
  echo "Memory of a key of 10 bytes with a value of 10: $(bytes_of_each "$MEMORY_KEYS" memory fill) bytes."
  # (Not in a subshell, which would close the connections.)
  bytes_of_each "$IDLE_CLIENTS" blank open_idle_clients >"$work/bytes"
  echo "Of an idle connection: $(<"$work/bytes") bytes, and" \
    "$(bytes_of_each "$IDLE_CLIENTS" blank use_clients) more once it has served a request."
  command -v redis-server >/dev/null || return 0
  place redis
  serve redis redis-server --bind 127.0.0.1 --port "${address[redis]#*:}" --save '' --appendonly no --dir "$work"
  poll 20 ask_redis ping >/dev/null
  echo "Memory of such a key in Redis: $(bytes_of_each "$MEMORY_KEYS" redis fill_redis) bytes."
}
bytes_of_each() { # COUNT INSTANCE COMMAND: by how much the memory of an instance grows for each that the command makes
  local before
  before=$(status_field "$2" VmRSS)
  "$3" "$1" "$2" && echo $((($(status_field "$2" VmRSS) - before) * 1024 / $1)) || echo error
}
use_clients() {
  local fd
  for fd in "${idle[@]}"; do gets 1 none >&"$fd" && read -r -t 5 -d '}' _ <&"$fd" || return; done
}
ask_redis() { redis-cli -h 127.0.0.1 -p "${address[redis]#*:}" "$@" 2>&1; }
fill_redis() { # KEYS
  seq -f $'SET %010.0f abcdefghij\r' "$1" | ask_redis --pipe >/dev/null
  [ "$(ask_redis dbsize)" = "$1" ]
}
bench() {
  local program what
  PATH+=:/usr/sbin # has nginx
  for program in wrk nginx; do
    command -v "$program" >/dev/null || { echo "test.sh: the bench needs $program" >&2 && return 2; }
  done
  write_wrk_script
  for what in requests replicas moves idle_store memory; do
    "measure_$what" >"$work/measured" || echo "$what: error" >>"$work/measured"
    tee -a "$work/report" <"$work/measured"
  done
  ! grep -q error "$work/report"
}

# ---- The grader: any image, as a black box ---------------------------------------------------------------------------
#
# It asks only for what the assignments ask for. Each section has containers of its own. When they cannot be asked, the
# checks that are left have failed, and one line says so and why.

readonly GRADED_SECTIONS=(single forwarding shards replicas)

usage() { sed -n '2,/at once\.$/s/^# \{0,1\}//p' "$0"; }
# refuse_to_grade SENTENCE: nothing can be graded, through no fault of the image. Machines are told in their own form.
refuse_to_grade() {
  case $style in
    tap) printf 'TAP version 13\nBail out! %s\n' "$1" ;;
    json) jq -n --arg output "$1" '{score: 0, max_score: 0, output: $output, tests: []}' ;;
  esac
  echo "test.sh: $1" >&2
  exit 2
}
read_grade_options() { # ARGUMENT...
  local words=()
  local -A variable=([--port]=served [--start]=comes_up_within [--timeout]=patience [--limit]=limit)
  while [ $# -gt 0 ]; do
    case $1 in
      --tap | --json) style=${1#--} ;;
      --port | --start | --timeout | --limit) whole_number "$@" && declare -g "${variable[$1]}=$2" && shift ;;
      --vocabulary) matches 'form|json' "form or json" "$@" && vocabulary=$2 && shift ;;
      --prefix) matches '(/[A-Za-z0-9._~-]+)*' "a path, /kvs for instance" "$@" && prefix=$2 && shift ;;
      --help | -h) usage && exit ;;
      -*) refuse_to_grade "no option $1; ./test.sh --help tells them" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  [ ${#words[@]} -gt 0 ] || refuse_to_grade "grade what? ./test.sh grade IMAGE"
  image=${words[0]} sections=("${words[@]:1}")
  [ ${#sections[@]} -gt 0 ] || sections=("${GRADED_SECTIONS[@]}")
  for section in "${sections[@]}"; do
    [[ " ${GRADED_SECTIONS[*]} " == *" $section "* ]] || refuse_to_grade "no section '$section'; --help tells them"
  done
}
matches() { [[ ${4-?} =~ ^($1)$ ]] || refuse_to_grade "$3 is $2, not '${4-}'"; } # PATTERN DESCRIPTION OPTION [VALUE]
whole_number() { # OPTION [VALUE]
  matches '[1-9][0-9]{0,4}' "a whole number from 1 to 65535" "$@"
  [ "$2" -le 65535 ] || refuse_to_grade "$1 is at most 65535, not $2"
}

tell() { # TEXT: what is no check
  case $style in
    text) printf '%s\n' "$1" ;;
    tap) indent '# ' "$1" ;;
    json) printf '%s\n' "$1" >>"$work/told" ;;
  esac
}
grade() {
  local program before instance
  for program in curl jq docker; do command -v "$program" >/dev/null || refuse_to_grade "$program is missing"; done
  docker info >/dev/null 2>&1 || refuse_to_grade "no Docker engine answers"
  docker image inspect "$image" >/dev/null 2>&1 || timeout "$limit" docker pull -q "$image" >/dev/null ||
    refuse_to_grade "no image $image"
  make_network || refuse_to_grade "Docker makes no network: $(tail -n 1 "$work/error")"
  [ "$style" != tap ] || echo 'TAP version 13'
  for section in "${sections[@]}"; do
    hopeless='' address=() url=() process=() settings=() ip=() before=("$passed" "$failed" "$(checks)")
    : >"$work/mistakes"
    "grade_$section"
    [ "$failed" = "${before[1]}" ] || for instance in "${!process[@]}"; do tell "$(last_lines "$instance")"; done
    report_skipped
    tell "$section: $((passed - before[0])) of $(($(checks) - before[2])) points"
    remove_containers
  done
  tell "total: $passed of $(checks) points; $failed wrong or without an answer, $unmade not asked"
  case $style in
    tap) echo "1..$reported" ;;
    json)
      jq -s --rawfile output "$work/told" \
        '{score: map(.score) | add, max_score: map(.max_score) | add, output: $output, tests: .}' "$work/tests"
      ;;
  esac
  [ "$unmade" -lt "$(checks)" ] || exit 2
  [ "$passed" -eq "$(checks)" ]
}
checks() { echo $((passed + failed + unmade)); }
grade_single() {
  start main && find_vocabulary
  test_single main
}
grade_forwarding() {
  start main && find_vocabulary
  start follower FORWARDING_ADDRESS="${address[main]}" MAINIP="${address[main]}"
  test_single follower
  test_forwarding
}
grade_shards() { test_shards; }
grade_replicas() { test_replicas; }
# find_vocabulary: unless it was said, what main speaks: who takes a form speaks form. In JSON, keys are found directly
# under the prefix, or under keys/.
find_vocabulary() {
  local found=form
  takes() { [[ $(status_of main PUT "$@") = 20* ]]; }
  if [ "$vocabulary" != form ]; then
    below=''
    if [ "$vocabulary" = json ] || ! takes probe -d val=1; then
      if takes probe "${json[@]}" -d '{"value":"1"}'; then
        found=json
      elif takes keys/probe -d '{"value":"1"}'; then
        found=json below=keys/
      else
        tell "$section: no PUT is accepted, in neither vocabulary (--vocabulary says in which one to ask)"
      fi
    fi
    vocabulary=${vocabulary:-$found}
    ask main DELETE "${below}probe" >/dev/null
    : >"$work/sent"
  fi
  given_up || tell "$section: asked in the vocabulary '$vocabulary', about keys under $prefix/$below"
}

# ---- The grader graded: answers with one defect each -----------------------------------------------------------------

make_defects() { # installs a curl that applies DEFECT to its arguments, or to its answer (the function `defect`)
  mkdir "$work/bin"
  cat >"$work/bin/curl" <<END
#!/usr/bin/env bash
defect() { cat; }
eval "\$DEFECT"
"$(command -v curl)" "\$@" | defect
exit "\${PIPESTATUS[0]}"
END
  chmod +x "$work/bin/curl"
}
verdict() { # ARGUMENT...: what the grader says, in short. The whole is in $work/graded.
  local ended
  (echo "$BASHPID" >>"$work/graders" && exec ./test.sh grade --json "$@") >"$work/graded" 2>"$work/grader.err"
  ended=$?
  jq -r --arg ended "$ended" '"\(.score) of \(.max_score), status \($ended)"' "$work/graded"
  cat "$work/grader.err"
}
# grades WHAT VERDICT DEFECT [ARGUMENT...]: of our own image, with this defect.
grades() { check "$1" "$2" "$(DEFECT=$3 PATH=$work/bin:$PATH verdict "$image" single "${@:4}")"; }
grades_image() { # WHAT VERDICT SETTING ARGUMENT...: of our own image, with this setting
  printf 'FROM %s\nENV %s\n' "$image" "$3" | docker build -q -t "$name-server:$1" - >/dev/null 2>"$work/error"
  check "$1" "$2" "$(verdict "$name-server:$1" single "${@:4}")"
}
# failed_with PATTERN: how many checks failed with it, as the last verdict says.
failed_with() { jq -r '.tests[] | select(.score < .max_score) | .output' "$work/graded" | grep -c "$1"; }

test_grader() {
  make_defects
  check "this project's own image" "168 of 168, status 0" "$(verdict "$image")"
  check "... in the other vocabulary" "57 of 57, status 0" "$(verdict "$image" single forwarding --vocabulary json)"
  grades "JSON spelled in another way" "25 of 25, status 0" \
    'defect() { sed "s/\":/\" : /g; s/^{/{ \"more\" : [], /"; }'
  grades "JSON only" "22 of 22, status 0" 'defect() { sed -z -E "s/.*\"msg\".*\x1e.../\x1e415/"; }'
  grades "200 in place of 201" "24 of 25, status 1" 'defect() { sed "s/^\x1e201/\x1e200/"; }'
  check "... and that is why" 1 "$(failed_with '^got  *.*200 .*New key created')"
  grades "another name of a member" "24 of 25, status 1" 'defect() { sed "s/\"value\":\"/\"val\":\"/"; }'
  # shellcheck disable=SC2016 # is expanded by the curl that has defects
  grades "DELETE forgets to" "22 of 25, status 1" 'set -- "${@/DELETE/GET}"'
  grades "DELETE has no answer" "20 of 25, status 1" '[[ $* != *DELETE* ]] || exit 28'
  check "... which is told from a wrong one" 3 "$(failed_with '^got .*no answer within 10 s')"
  grades_image ends_at_once "0 of 25, status 2" IP=localhost
  check "... and that is why" 1 "$(failed_with '^main ended with status 2 before it answered')"
  check "... with its last words" 1 "$(failed_with '^  kv-store: IP=localhost')"
  grades_image does_not_listen "0 of 25, status 2" IP=127.0.0.1 --start 3
  check "... and that is why" 1 \
    "$(failed_with '^main runs, but its port 8080 is still closed after 3 s (does it listen there, on 0.0.0.0?)$')"
  grades "the time in all" "1 of 25, status 1" '[[ $* != *DELETE* ]] || exec sleep 99' --vocabulary form --limit 15
  check "... ends it" 1 "$(failed_with '^the time in all is over, 15 s')"
  check "TAP" "TAP version 13, ok 25, 1..25" \
    "$(./test.sh grade "$image" single --tap | sed -n '1p; s/^\(ok 25\).*/\1/p; $p' | paste -sd, | sed 's/,/, /g')"
  check "nothing can be graded, in JSON" "0 no section 'nothing'" \
    "$(./test.sh grade --json x nothing 2>/dev/null | jq -r '"\(.score) \(.output | split(";")[0])"')"
  mapfile -t graders < <(sed 's/.*/--filter=name=^kv-grade-&-/' "$work/graders")
  check "nothing is left of its containers and networks" "" \
    "$(docker ps -aq "${graders[@]}" && docker network ls -q "${graders[@]}")"
}

# ---- AddressSanitizer under mixed load -------------------------------------------------------------------------------

readonly SANITIZE_SECONDS=${SANITIZE_SECONDS:-300}

build_sanitized() {
  local target
  target=$(rustc -vV | sed -n 's/^host: //p')
  binary=target/sanitize/$target/release/kv-store
  # (The toolchain has the sanitizer, but lets only unstable builds ask for it.)
  RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=line-tables-only \
    cargo build --release --locked --target "$target" --target-dir target/sanitize
}

# write_load: a program for python3, load.py SECONDS HOST:PORT... NUMBER: a client, each time of an instance at random.
# What it sends, how much of it, what it reads and how it leaves are random. Prints how it left each time.
write_load() {
  cat >"$work/load.py" <<'END'
import random, socket, struct, sys, threading, time

end, instances = time.monotonic() + float(sys.argv[1]), [address.split(":") for address in sys.argv[2:-1]]

def request(verb, key=None, body=b"", head=""):
    key = key or f"k{random.randrange(500)}"
    return f"{verb} /kv-store/{key} HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body

REQUESTS = [
    lambda: request("GET"),
    lambda: request("PUT", body=b"val=" + b"v" * random.randrange(3000)),
    lambda: request(random.choice(["DELETE", "HEAD", "POST"])),
    lambda: request("GET", "big") * random.randrange(8),
    lambda: request("PUT", random.choice(["big", None]), b"val=" + b"v" * random.randrange(1 << 20)),
    lambda: random.choice([b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]),
    lambda: request("GET", head="Connection: close\r\n") + b"x" * random.randrange(1 << 16),
]

def read(client, most):
    try:
        while most > 0 and client.recv(1 << 16):
            most -= 1
    except OSError:  # The instance was killed, or has closed the connection.
        pass

def reset(client):  # To close it sends a reset then.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

LEAVE = {
    "read_all": lambda client: (client.shutdown(socket.SHUT_WR), read(client, 1000)),
    "read_some": lambda client: read(client, random.randrange(50)),
    "read_nothing": lambda client: None,
    "reset": lambda client: (read(client, random.randrange(2)), reset(client)),
    "lingered": lambda client: (read(client, 1), time.sleep(random.random() / 5), client.sendall(b"x" * (1 << 16))),
}

def converse(client, _):
    count, way = random.choice([1, 1, 1, 2, 5, 60]), random.choice(list(LEAVE))
    data = b"".join(random.choice(REQUESTS[: random.randrange(1, 8)])() for _ in range(count))
    if random.random() < 0.4:
        data = data[: random.randrange(len(data) + 1)]
    if random.random() < 0.4:  # Reads while it sends.
        threading.Thread(target=read, args=[client, 1000], daemon=True).start()
    client.sendall(data)
    LEAVE[way](client)
    return way

def stream(answers, questions):  # That brings nonsense, or nothing.
    head = f"/kv-store?stream={random.random()} HTTP/1.1\r\nHost: t\r\nContent-Type: application/x-kv-store-stream\r\n"
    answers.sendall(f"GET {head}\r\n".encode())
    read(answers, 1)
    questions.sendall(f"POST {head}Content-Length: 99999\r\n\r\n".encode() + random.randbytes(random.randrange(200)))
    if random.random() < 0.5:
        reset(random.choice([answers, questions]))
    read(answers, 1)
    return "streamed"

while time.monotonic() < end:
    where = tuple(random.choice(instances)), random.choice([0.1, 0.3, 3])
    try:
        with socket.create_connection(*where) as first, socket.create_connection(*where) as second:
            print(random.choice([converse] * 6 + [stream])(first, second))
    except OSError:
        pass
END
}
ended_of() { each end_of_process "$@" | grep -o error | wc -l; } # INSTANCE...: how many have ended
sanitize() {
  local load round=0 all=(main follower n1 n2 n3) ways='lingered read_all read_nothing read_some reset streamed'
  check "the program is built with it" 1 "$(grep -c -m 1 __asan_init "$binary")"
  # It says what it finds in files, since the instances have taken stderr for themselves.
  export ASAN_OPTIONS=log_path=$work/asan:detect_leaks=0
  write_load
  start main && start follower FORWARDING_ADDRESS="${address[main]}" && start_store "n1 n2 n3"
  at_once 20 python3 "$work/load.py" "$SANITIZE_SECONDS" "${address[@]}" &
  load=$!
  # The store grows and shrinks, its factor changes, and one node is killed and started again.
  while kill -0 "$load" 2>/dev/null && [ "$(ended_of "${all[@]}")" = 0 ]; do
    case $((round++ % 4)) in
      0) change_to n1 n1 n2 ;;
      1) factor_to $((round % 8 > 4 ? 3 : 1)) n1 n1 n2 n3 ;;
      2) act kill n3 && restart n3 ;;
      3) change n1 "\"view\":\"$(view n1 n2)\",\"repl-factor\":1,\"force\":true" ;;
    esac >/dev/null
    sleep 2
  done
  check "all instances live after $SANITIZE_SECONDS s" 0 "$(ended_of "${all[@]}")"
  wait "$load"
  check "clients have left in each way" "$ways" "$(output | sort -u | xargs)"
  on "${all[*]}" check_output "NODE answers" 200 status_of NODE GET /kv-store
  check "nothing was found" "" "$(grep -h -A 12 'ERROR: AddressSanitizer' "$work"/asan.*)"
}

# ---- The run ---------------------------------------------------------------------------------------------------------

run() { # TEST [INSTANCE]: its checks are named after it
  [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $1 "* ]] || return 0
  section=${1//_/ }${2:+, $2} hopeless=''
  "test_$1" "${@:2}"
  report_skipped
}
run_tests() {
  local test instance idle=() idle_until
  make_large_values
  start main && start follower FORWARDING_ADDRESS="${address[main]}"
  start second FORWARDING_ADDRESS="${address[follower]}"
  given_up && echo "test.sh: $hopeless" >&2 && exit 1
  open_idle_clients "$IDLE_CLIENTS" main
  run instances
  run metrics
  for instance in main follower; do
    for test in form json values limits http heads; do run "$test" "$instance"; done
  done
  run follower_is_no_different
  for test in large_answers many_clients streams main_paused; do run "$test"; done
  run idle main
  for test in settings forwarding main_gone contexts shards nodes view_changes refused_view_changes secret \
    writers_during_changes node_paused killed_in_a_view_change stale_nodes first_views replicas shards_of_several \
    replicas_killed replica_paused; do run "$test"; done
  if [ "$where" = process ]; then run unread_stderr; else run image && run grader; fi
}

mode=${1:-}
[ -n "$mode" ] || { docker info >/dev/null 2>&1 && mode=docker || mode=local; }
task=run_tests build=build_process only=("${@:2}")
case $mode in
  local) ;;
  docker) where=container build=build_container ;;
  bench) task=bench ;;
  sanitize) task=sanitize build=build_sanitized section=sanitize ;;
  grade)
    task=grade build=true where=container strict=false name=kv-grade-$$-$RANDOM patience=10 limit=600 vocabulary=''
    read_grade_options "${@:2}"
    ;;
  --help | -h | help) usage && exit ;;
  *)
    usage
    exit 2
    ;;
esac
work=$(mktemp -d)
touch "$work"/{sent,error,told,tests,mistakes}
trap clean EXIT
trap 'exit 130' INT TERM HUP
"$build" >"$work/build" 2>&1 || { cat "$work/build" && echo "test.sh: the build failed" && exit 1; }
case $task in
  grade | bench) "$task" ;;
  *)
    "$task"
    printf '%d passed, %d failed\n' "$passed" $((failed + unmade))
    [ "$passed" -eq "$(checks)" ]
    ;;
esac

#!/usr/bin/env bash
# test.sh: grades a kv-store against its contract (README.md), with curl and bash alone.
#
# usage: ./test.sh            in containers if a Docker engine answers, else with processes on this machine
#        ./test.sh docker     in containers, on a network of their own
#        ./test.sh local      with processes of target/release/kv-store
#        ./test.sh bench      measures instead of testing, in about five minutes: needs wrk; see README.md, "Speed"
#        ./test.sh sanitize   runs processes built with AddressSanitizer under mixed load for two minutes: needs python3
#        ./test.sh grade IMAGE [SECTION...]
#                             grades any image, as a black box in containers: needs jq. Sections: single forwarding shards
#                             replicas; without any, all of them. Options, before or after IMAGE:
#          --port N           the port that the image serves, which is also given to it as PORT (8080)
#          --prefix /PATH     what all paths begin with (/kv-store)
#          --tap, --json      prints TAP version 13, or one JSON object as Gradescope takes it
#          --timeout S        for each request, in seconds (10)
#          --limit S          for everything, in seconds (600); what has not been asked then has failed
#
# Builds what it tests, starts what it needs and removes it again. Prints a line a check, and at the end
# "N passed, N failed"; exit status 1 if any failed. Can run several times at once.
set -u -o pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")" || exit 2

readonly LIMIT=1048576 # bytes of a value
readonly IDLE_CLIENTS=500
name=kv-test-$$-$RANDOM
passed=0 failed=0
declare -A url=()     # instance -> where curl reaches it
declare -A address=() # instance -> where other instances reach it, host:port
declare -A process=() # instance -> process or container
declare -A settings=()

# ---- Instances: the same verbs for containers and for processes ------------------------------------------------------

build_docker() { docker build -q -t kv-store:test . >"$work/build" 2>&1; }
build_local() { cargo build --release --locked >"$work/build" 2>&1; }
binary=target/release/kv-store

# address_docker INSTANCE: fixes where others reach an instance, before it runs.
address_docker() { address[$1]=$1:8080; }
address_local() {
  local port
  while port=$((20000 + RANDOM % 12000)) && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  address[$1]=127.0.0.1:$port
}

# launch_docker INSTANCE: starts the instance with its settings.
launch_docker() {
  local variables=() variable
  for variable in ${settings[$1]}; do variables+=(-e "$variable"); done
  process[$1]=$name-$1
  docker rm -f "${process[$1]}" >/dev/null 2>&1
  # Clients come in over Docker's own network, so that they reach an instance that is cut off from the others.
  docker create --name "${process[$1]}" -p 127.0.0.1::8080 "${variables[@]}" kv-store:test >/dev/null && heal_docker "$1" &&
    docker start "${process[$1]}" >/dev/null && locate_docker "$1"
}
cut_docker() { docker network disconnect "$name" "${process[$1]}"; }
heal_docker() { docker network connect --alias "$1" "$name" "${process[$1]}"; }
locate_docker() { url[$1]=http://$(docker port "${process[$1]}" 8080/tcp | head -n 1); }
launch_local() {
  local port=${address[$1]##*:}
  # shellcheck disable=SC2086 # settings are words
  env -u FORWARDING_ADDRESS -u MAINIP -u ADDRESS -u VIEW -u REPL_FACTOR -u SECRET IP=127.0.0.1 PORT="$port" ${settings[$1]} \
    "$binary" 2>>"$work/$1.log" &
  process[$1]=$!
  url[$1]=http://127.0.0.1:$port
}

kill_docker() { docker kill "${process[$1]}" >/dev/null; }
kill_local() {
  disown "${process[$1]}" # or bash would report its end
  kill -KILL "${process[$1]}"
  while kill -0 "${process[$1]}" 2>/dev/null; do sleep 0.01; done
}
pause_docker() { docker pause "${process[$1]}" >/dev/null; }
# (The signal is sent when kill returns, and has arrived some time later.)
pause_local() { kill -STOP "${process[$1]}" && poll grep -q '^State:.T' "/proc/${process[$1]}/status"; }
resume_docker() { docker unpause "${process[$1]}" >/dev/null; }
resume_local() { kill -CONT "${process[$1]}"; }
# stop_docker INSTANCE: asks it to end; its exit status is in $ended.
stop_docker() { docker stop "${process[$1]}" >/dev/null && ended=$(docker inspect -f '{{.State.ExitCode}}' "${process[$1]}"); }
stop_local() {
  kill -TERM "${process[$1]}"
  wait "${process[$1]}"
  ended=$?
}
# run_docker VARIABLE=VALUE... [-- ARGUMENT...]: runs the program to its end; prints its output and its exit status.
run_docker() {
  local variables=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do variables+=(-e "$1") && shift; done
  timeout 10 docker run --rm "${variables[@]}" kv-store:test "${@:2}" 2>&1
  echo "status $?"
}
run_local() {
  local variables=(FORWARDING_ADDRESS= MAINIP= ADDRESS= VIEW= REPL_FACTOR= SECRET= IP= PORT=)
  while [ $# -gt 0 ] && [ "$1" != -- ]; do variables+=("$1") && shift; done
  timeout 10 env "${variables[@]}" "$binary" "${@:2}" 2>&1
  echo "status $?"
}
# health_docker INSTANCE: the exit status of the health check of an instance.
health_docker() { docker exec "${process[$1]}" /kv-store --health && echo 0 || echo 1; }
health_local() {
  # shellcheck disable=SC2086 # settings are words
  env IP=127.0.0.1 PORT="${address[$1]##*:}" ${settings[$1]} timeout 10 "$binary" --health && echo 0 || echo 1
}
# status_field INSTANCE FIELD: what the kernel says of the process: VmHWM (the most memory it ever had, in KiB), Threads.
log_docker() { docker logs "${process[$1]}" 2>&1; }
log_local() { cat "$work/$1.log"; }
process_id_docker() { docker inspect -f '{{.State.Pid}}' "${process[$1]}"; }
process_id_local() { echo "${process[$1]}"; }
status_field() { awk -v field="$2:" '$1 == field { print $2 }' "/proc/$("process_id_$mode" "$1")/status"; }

clean_docker() {
  docker ps -aq --filter "name=^$name-" | xargs -r docker rm -f >/dev/null 2>&1
  docker network rm "$name" >/dev/null 2>&1
  docker images -q "$name-server" | sort -u | xargs -r docker rmi -f >/dev/null 2>&1
}
clean_local() {
  local instance
  for instance in "${!process[@]}"; do kill_local "$instance" 2>/dev/null; done
}
clean() {
  trap '' EXIT INT TERM HUP
  jobs -p | xargs -r kill 2>/dev/null
  "clean_$mode"
  rm -rf "$work"
}

# start INSTANCE [VARIABLE=VALUE...]: starts an instance and waits until it answers.
start() {
  [ -n "${address[$1]:-}" ] || "address_$mode" "$1"
  settings[$1]="${*:2}"
  "launch_$mode" "$1"
  await_answer "$1"
}
restart() { "launch_$mode" "$1" && await_answer "$1"; }
await_answer() { poll curl -s -o /dev/null -m 1 "${url[$1]}/kv-store"; }
# poll COMMAND...: again and again, until the command succeeds.
poll() {
  local try
  for try in {1..100}; do
    "$@" && return
    sleep 0.05
  done
  echo "test.sh: in vain, $try times: $*" >&2
  return 1
}

# ---- Checks: one line each -------------------------------------------------------------------------------------------

# check WHAT EXPECTED GOT [SENT]
check() {
  if [ "$2" = "$3" ]; then
    passed=$((passed + 1))
    printf 'ok    %s\n' "$1"
  else
    failed=$((failed + 1))
    printf 'FAIL  %s\n' "$1"
    [ -z "${4:-}" ] || printf '      sent      %.300s\n' "$4"
    printf '      expected  %.600s\n      got       %.600s\n' "$2" "$3"
  fi
}
# tell_total: says how many checks passed; fails if one did not.
tell_total() {
  printf '%d passed, %d failed\n' "$passed" "$failed"
  [ "$failed" -eq 0 ]
}
# check_that WHAT CONDITION...: the condition is an arithmetic expression.
check_that() { check "$1" "true: $2" "$(if (($2)); then echo true; else echo false; fi): $2"; }

# ask INSTANCE VERB PATH [CURL ARGUMENT...]: prints "STATUS TYPE BODY", where TYPE is left out if it is JSON.
ask() {
  local answer
  answer=$(curl -s -S -m 10 -X "$2" -w '\n%{http_code} %{content_type}' "${url[$1]}$3" "${@:4}" 2>&1 | tr -d '\0')
  local body=${answer%$'\n'*} status=${answer##*$'\n'}
  printf '%s %s' "${status% application/json}" "${body%$'\n'}"
}
# expect WHAT ANSWER INSTANCE VERB PATH [CURL ARGUMENT...]: the answer is "STATUS BODY".
expect() { check "$1" "$2" "$(ask "${@:3}")" "${*:4}"; }

readonly -a json=(-H 'Content-Type: application/json')
# status_of: asks, and prints the status alone.
status_of() { ask "$@" | cut -d ' ' -f 1; }

# now: milliseconds since some moment.
now() { echo $(($(date +%s%N) / 1000000)); }

# raw INSTANCE BYTES: sends bytes (a printf format) as they are, but that each request gets a host (to leave it out, write the
# version as HTTP/1.\x31); prints all that comes back until the server closes the connection, or "STILL OPEN" if it does not
# within 8 s.
raw() {
  local host=${url[$1]#http://} answer
  exec 3<>"/dev/tcp/${host%:*}/${host#*:}"
  # shellcheck disable=SC2059 # the format is the point
  printf "$(with_hosts "$2")" >&3
  answer=$(timeout 8 cat <&3) || answer+="STILL OPEN"
  exec 3>&-
  printf '%s' "$answer"
}
with_hosts() { printf '%s' "${1//HTTP\/1.1\\r\\n/HTTP/1.1\\r\\nHost: test\\r\\n}"; }
# statuses: the status lines and bodies in what raw prints, on one line.
statuses() { tr -d '\r' | grep -a -o -E '^HTTP/1.1 [0-9]+|^\{.*|STILL OPEN' | sed 's|HTTP/1.1 ||' | tr '\n' ' '; }
# expect_raw WHAT ANSWERS INSTANCE BYTES: answers are "STATUS BODY STATUS BODY ...".
expect_raw() { check "$1" "$2" "$(raw "$3" "$4" | statuses | sed 's/ *$//')" "$4"; }

# ---- The table of answers --------------------------------------------------------------------------------------------

form_error() { echo "$1 {\"result\":\"Error\",\"msg\":\"$2\"}"; }
json_error() { echo "$1 {\"error\":\"$2\",\"message\":\"Error in $3\"}"; }

test_form_vocabulary() { # INSTANCE
  local i=$1 p="form, $1:"
  expect "$p PUT makes a key" '201 {"replaced":"False","msg":"New key created"}' "$i" PUT /kv-store/foo -d val=bar
  expect "$p GET finds it" '200 {"result":"Success","value":"bar"}' "$i" GET /kv-store/foo
  expect "$p PUT replaces it" '200 {"replaced":"True","msg":"Value of existing key replaced"}' "$i" PUT /kv-store/foo -d val=baz
  expect "$p GET finds the new value" '200 {"result":"Success","value":"baz"}' "$i" GET /kv-store/foo
  expect "$p the other vocabulary reads it" '200 {"doesExist":true,"message":"Retrieved successfully","value":"baz"}' "$i" GET /kv-store/keys/foo
  expect "$p PUT without a value" "$(form_error 403 'No value provided')" "$i" PUT /kv-store/foo
  expect "$p PUT with another field" "$(form_error 403 'No value provided')" "$i" PUT /kv-store/foo -d value=1
  expect "$p PUT with a body that is no form" "$(form_error 403 'No value provided')" "$i" PUT /kv-store/foo -H 'Content-Type: text/html' -d val=bar
  expect "$p PUT with a form in parts" "$(form_error 403 'No value provided')" "$i" PUT /kv-store/foo -F val=bar
  expect "$p PUT with a key that is not valid" "$(form_error 403 'Key not valid')" "$i" PUT /kv-store/f-oo -d val=bar
  expect "$p the key is checked before the value" "$(form_error 403 'Key not valid')" "$i" PUT /kv-store/f-oo
  expect "$p PUT with a value that is not UTF-8" "$(form_error 403 'Value is not valid UTF-8')" "$i" PUT /kv-store/foo -d val=%ff
  expect "$p a refused PUT leaves the value" '200 {"result":"Success","value":"baz"}' "$i" GET /kv-store/foo
  expect "$p PUT with an empty value" '200 {"replaced":"True","msg":"Value of existing key replaced"}' "$i" PUT /kv-store/foo -d val=
  expect "$p GET gives the empty value" '200 {"result":"Success","value":""}' "$i" GET /kv-store/foo
  expect "$p the first val counts" '200 {"replaced":"True","msg":"Value of existing key replaced"}' "$i" PUT '/kv-store/foo?val=4' -d 'a=0&val=1&val=2'
  expect "$p ... and it is the body's" '200 {"result":"Success","value":"1"}' "$i" GET /kv-store/foo
  expect "$p PUT with the value in the query" '200 {"replaced":"True","msg":"Value of existing key replaced"}' "$i" PUT '/kv-store/foo?val=a+b%21'
  expect "$p ... which is decoded" '200 {"result":"Success","value":"a b!"}' "$i" GET /kv-store/foo
  expect "$p DELETE removes the key" '200 {"result":"Success"}' "$i" DELETE /kv-store/foo
  expect "$p DELETE of no key" "$(form_error 404 'Key does not exist')" "$i" DELETE /kv-store/foo
  expect "$p GET of no key" "$(form_error 404 'Key does not exist')" "$i" GET /kv-store/foo
  expect "$p GET of a key that cannot exist" "$(form_error 404 'Key does not exist')" "$i" GET /kv-store/f-oo
  expect "$p no such path" "$(form_error 404 'Not found')" "$i" GET /kv-store/a/b
  expect "$p no such path at the top" "$(form_error 404 'Not found')" "$i" GET /
  expect "$p a verb that a key does not take" "$(form_error 405 'Method not allowed')" "$i" POST /kv-store/foo -d val=1
}

test_json_vocabulary() { # INSTANCE
  local i=$1 p="JSON, $1:"
  expect "$p PUT makes a key" '201 {"message":"Added successfully","replaced":false}' "$i" PUT /kv-store/keys/foo "${json[@]}" -d '{"value":"bar"}'
  expect "$p GET finds it" '200 {"doesExist":true,"message":"Retrieved successfully","value":"bar"}' "$i" GET /kv-store/keys/foo
  expect "$p PUT replaces it" '200 {"message":"Updated successfully","replaced":true}' "$i" PUT /kv-store/foo "${json[@]}" -d '{"value":"baz"}'
  expect "$p the other vocabulary reads it" '200 {"result":"Success","value":"baz"}' "$i" GET /kv-store/foo
  expect "$p the type may have parameters and any case" '200 {"doesExist":true,"message":"Retrieved successfully","value":"baz"}' "$i" GET /kv-store/foo -H 'content-type: Application/JSON; charset=utf-8'
  expect "$p PUT without a body" "$(json_error 400 'Value is missing' PUT)" "$i" PUT /kv-store/keys/foo "${json[@]}"
  expect "$p PUT without the member" "$(json_error 400 'Value is missing' PUT)" "$i" PUT /kv-store/keys/foo "${json[@]}" -d '{}'
  expect "$p PUT with null" "$(json_error 400 'Value is missing' PUT)" "$i" PUT /kv-store/keys/foo "${json[@]}" -d '{"value":null}'
  expect "$p PUT with an array as body" "$(json_error 400 'Body is not a JSON object' PUT)" "$i" PUT /kv-store/keys/foo "${json[@]}" -d '["value"]'
  expect "$p PUT with half a body" "$(json_error 400 'Body is not a JSON object' PUT)" "$i" PUT /kv-store/keys/foo "${json[@]}" -d '{"value":"b'
  expect "$p PUT with a key of 51 characters" "$(json_error 400 'Key is too long' PUT)" "$i" PUT "/kv-store/keys/$(printf 'k%.0s' {1..51})" "${json[@]}" -d '{"value":1}'
  expect "$p the key is checked before the value" "$(json_error 400 'Key is too long' PUT)" "$i" PUT "/kv-store/keys/$(printf 'k%.0s' {1..51})"
  expect "$p a refused PUT leaves the value" '200 {"doesExist":true,"message":"Retrieved successfully","value":"baz"}' "$i" GET /kv-store/keys/foo
  expect "$p DELETE removes the key" '200 {"doesExist":true,"message":"Deleted successfully"}' "$i" DELETE /kv-store/keys/foo
  expect "$p DELETE of no key" '404 {"doesExist":false,"error":"Key does not exist","message":"Error in DELETE"}' "$i" DELETE /kv-store/keys/foo
  expect "$p GET of no key" '404 {"doesExist":false,"error":"Key does not exist","message":"Error in GET"}' "$i" GET /kv-store/keys/foo
  expect "$p GET of a key that cannot exist" '404 {"doesExist":false,"error":"Key does not exist","message":"Error in GET"}' "$i" GET "/kv-store/keys/$(printf 'k%.0s' {1..300})"
  expect "$p no such path" "$(json_error 404 'Not found' GET)" "$i" GET /nowhere "${json[@]}"
  expect "$p a verb that a key does not take" "$(json_error 405 'Method not allowed' PATCH)" "$i" PATCH /kv-store/keys/foo
  expect "$p a verb that the count does not take" "$(json_error 405 'Method not allowed' PUT)" "$i" PUT /kv-store/key-count -d val=1
  expect "$p a verb that the view change does not take" "$(json_error 405 'Method not allowed' GET)" "$i" GET /kv-store/view-change
  expect "$p a verb that the instance does not take" "$(json_error 405 'Method not allowed' DELETE)" "$i" DELETE /kv-store
  expect "$p shards without ADDRESS" "$(json_error 400 'ADDRESS is not set' GET)" "$i" GET /kv-store/shards
  expect "$p a shard without ADDRESS" "$(json_error 400 'ADDRESS is not set' GET)" "$i" GET /kv-store/shards/1
  expect "$p a view change without ADDRESS" "$(json_error 400 'ADDRESS is not set' PUT)" "$i" PUT /kv-store/view-change "${json[@]}" -d '{"view":"a:1"}'
  local allow='curl -s -o /dev/null -w %{http_code}_%header{allow} -X'
  check "$p 405 of a key says what it takes" '405_GET, HEAD, PUT, DELETE' "$($allow POST "${url[$i]}/kv-store/foo")"
  check "$p 405 of the count says what it takes" '405_GET, HEAD' "$($allow PUT "${url[$i]}/kv-store/key-count")"
  check "$p 405 of the view change says what it takes" '405_PUT' "$($allow GET "${url[$i]}/kv-store/view-change")"
}

test_json_values() { # INSTANCE
  local value
  for value in '"text"' '""' 0 -12.50 1e400 123456789012345678901234567890 true false '[]' '[1,"two",null,{"three":[]}]' '{"a":{"b":null}}' '"\"\\\/\b\f\n\r\t\u0001"'; do
    expect "JSON, $1: PUT $value" '201 {"message":"Added successfully","replaced":false}' "$1" PUT /kv-store/keys/v "${json[@]}" -d "{\"value\":$value}"
    # What JSON lets one write in several ways comes back in the shortest.
    local back=${value//\\\//\/}
    expect "JSON, $1: ... comes back" "200 {\"doesExist\":true,\"message\":\"Retrieved successfully\",\"value\":$back}" "$1" GET /kv-store/keys/v
    expect "JSON, $1: ... in the other vocabulary too" "200 {\"result\":\"Success\",\"value\":$back}" "$1" GET /kv-store/v
    expect "JSON, $1: ... and goes" '200 {"doesExist":true,"message":"Deleted successfully"}' "$1" DELETE /kv-store/keys/v
  done
  for value in '"\ud800"' '"a\udc00b"' '["\ud83d\ude00","\ud800"]' '{"\udc00":1}'; do
    expect "JSON, $1: half a surrogate pair: $value" "$(json_error 400 'Value is not valid UTF-8' PUT)" "$1" PUT /kv-store/keys/v "${json[@]}" -d "{\"value\":$value}"
  done
  # (Bytes that are no UTF-8 are sent from a file: that is the same on every system.)
  for value in '"a\xffb"' '"\xed\xa0\x80"'; do
    # shellcheck disable=SC2059 # the format is the point
    printf "{\"value\":$value}" >"$work/body"
    expect "JSON, $1: no UTF-8 in the value: $value" "$(json_error 400 'Value is not valid UTF-8' PUT)" "$1" PUT /kv-store/keys/v "${json[@]}" --data-binary "@$work/body"
  done
  for value in '{"x":"\xff","value":1}' '{"\xff":1,"value":1}' '{"value":["\xff"]}' '{"value":1,"x":["\xff"]}' '{"value":"1"}\xff'; do
    # shellcheck disable=SC2059
    printf "$value" >"$work/body"
    expect "JSON, $1: no UTF-8 elsewhere: $value" "$(json_error 400 'Body is not a JSON object' PUT)" "$1" PUT /kv-store/keys/v "${json[@]}" --data-binary "@$work/body"
  done
  { printf '{' && seq -f '"member %.0f":null,' 150000 && printf '"v\\u0061lue":1}'; } >"$work/members"
  expect "JSON, $1: the value among many members" '201 {"message":"Added successfully","replaced":false}' "$1" PUT /kv-store/keys/v "${json[@]}" -d "@$work/members"
  expect "JSON, $1: ... and goes" '200 {"doesExist":true,"message":"Deleted successfully"}' "$1" DELETE /kv-store/keys/v
}

# Values that need encoding: what is sent, and how JSON spells it.
test_encodings() { # INSTANCE
  local -a raw_values=('a b' 'a+b' '100%' '%41' 'a"b' 'a\b' $'two\nlines' $'a\tb' '😀 ünï' 'a&b=c' '<>#?/')
  local -a spelled=('a b' 'a+b' '100%' '%41' 'a\"b' 'a\\b' 'two\nlines' 'a\tb' '😀 ünï' 'a&b=c' '<>#?/')
  local n
  for n in "${!raw_values[@]}"; do
    check "encodings, $1: PUT ${spelled[n]}" 201 "$(status_of "$1" PUT /kv-store/enc --data-urlencode "val=${raw_values[n]}")"
    expect "encodings, $1: ... comes back" "200 {\"result\":\"Success\",\"value\":\"${spelled[n]}\"}" "$1" GET /kv-store/enc
    check "encodings, $1: ... as JSON" 200 "$(status_of "$1" PUT /kv-store/keys/enc "${json[@]}" -d "{\"value\":\"${spelled[n]}\"}")"
    expect "encodings, $1: ... comes back" "200 {\"result\":\"Success\",\"value\":\"${spelled[n]}\"}" "$1" GET /kv-store/enc
    check "encodings, $1: ... and goes" 200 "$(status_of "$1" DELETE /kv-store/enc)"
  done
  check "encodings, $1: PUT with a NUL" 201 "$(status_of "$1" PUT /kv-store/enc -d 'val=a%00b')"
  expect "encodings, $1: ... comes back" '200 {"result":"Success","value":"a\u0000b"}' "$1" GET /kv-store/enc
  check "encodings, $1: ... and goes" 200 "$(status_of "$1" DELETE /kv-store/enc)"
}

# Keys that need encoding, and keys that only look like something else.
test_keys() { # INSTANCE
  local key
  for key in a%20b a+b a%25b %22 %5C a%2Fb %2F . .. %2e%2e %00 %F0%9F%98%80 %C3%BC '%C3%BC%C3%BC' a%3Fb a%23b 'a;b=c' key-count view-change keys "$(printf '%%C3%%BC%.0s' {1..50})"; do
    check "keys, $1: PUT $key" 201 "$(status_of "$1" PUT "/kv-store/keys/$key" --path-as-is "${json[@]}" -d "{\"value\":\"of $key\"}")"
    expect "keys, $1: ... comes back" "200 {\"doesExist\":true,\"message\":\"Retrieved successfully\",\"value\":\"of $key\"}" "$1" GET "/kv-store/keys/$key" --path-as-is
    check "keys, $1: ... and goes" 200 "$(status_of "$1" DELETE "/kv-store/keys/$key" --path-as-is)"
  done
  check "keys, $1: case counts" "201 404" "$(status_of "$1" PUT /kv-store/Case -d val=1) $(status_of "$1" GET /kv-store/case)"
  check "keys, $1: ... and goes" 200 "$(status_of "$1" DELETE /kv-store/Case)"
  check "keys, $1: 200 characters in the form vocabulary" 201 "$(status_of "$1" PUT "/kv-store/$(printf 'k%.0s' {1..200})" -d val=1)"
  check "keys, $1: ... and goes" 200 "$(status_of "$1" DELETE "/kv-store/$(printf 'k%.0s' {1..200})")"
  expect "keys, $1: 201 are too many" "$(form_error 403 'Key not valid')" "$1" PUT "/kv-store/$(printf 'k%.0s' {1..201})" -d val=1
  expect "keys, $1: one that is not UTF-8" "$(json_error 400 'Key is too long' PUT)" "$1" PUT /kv-store/keys/%ff "${json[@]}" -d '{"value":1}'
  expect "keys, $1: an empty one" "$(json_error 400 'Key is too long' PUT)" "$1" PUT /kv-store/keys/ "${json[@]}" -d '{"value":1}'
}

test_limits() { # INSTANCE
  local i=$1 p="limits, $1:"
  { printf 'val=' && head -c "$LIMIT" /dev/zero | tr '\0' v; } >"$work/full"
  { cat "$work/full" && printf v; } >"$work/over"
  { printf '{"value":"' && head -c "$LIMIT" /dev/zero | tr '\0' v && printf '"}'; } >"$work/full.json"
  { printf '{"value":"' && head -c "$((LIMIT + 1))" /dev/zero | tr '\0' v && printf '"}'; } >"$work/over.json"
  { printf '{"value":"' && head -c "$LIMIT" /dev/zero | sed 's#\x00#\\/#g' && printf '"}'; } >"$work/escaped.json"
  head -c 20000000 /dev/zero | tr '\0' v >"$work/huge"
  check "$p a value of exactly the limit" 201 "$(status_of "$i" PUT /kv-store/big -d "@$work/full")"
  check "$p ... comes back" $((LIMIT + 32)) "$(curl -s -m 10 "${url[$i]}/kv-store/big" | wc -c)"
  expect "$p one byte more" "$(form_error 403 'Object too large. Size limit is 1MB')" "$i" PUT /kv-store/big -d "@$work/over"
  check "$p exactly the limit in JSON" 200 "$(status_of "$i" PUT /kv-store/keys/big "${json[@]}" -d "@$work/full.json")"
  check "$p exactly the limit, all of it escaped" 200 "$(status_of "$i" PUT /kv-store/keys/big "${json[@]}" -d "@$work/escaped.json")"
  expect "$p one byte more in JSON" "$(json_error 413 'Value is too large' PUT)" "$i" PUT /kv-store/keys/big "${json[@]}" -d "@$work/over.json"
  expect "$p 20 MB" "$(form_error 403 'Object too large. Size limit is 1MB')" "$i" PUT /kv-store/big -d "@$work/huge" -H Expect:
  expect "$p ... with a verb that a key does not take" "$(form_error 405 'Method not allowed')" "$i" POST /kv-store/big -d "@$work/huge" -H Expect:
  expect "$p the key is checked before the size" "$(form_error 403 'Key not valid')" "$i" PUT /kv-store/b-g -d "@$work/over"
  check "$p the value is still there" $((LIMIT + 32)) "$(curl -s -m 10 "${url[$i]}/kv-store/big" | wc -c)"
  check "$p ... and goes" 200 "$(status_of "$i" DELETE /kv-store/big)"
  { printf '{"value":' && head -c 100000 /dev/zero | tr '\0' '[' && head -c 100000 /dev/zero | tr '\0' ']' && printf '}'; } >"$work/deep.json"
  check "$p JSON nested 100,000 deep" 201 "$(status_of "$i" PUT /kv-store/keys/deep "${json[@]}" -d "@$work/deep.json")"
  check "$p ... comes back" 200063 "$(curl -s -m 10 "${url[$i]}/kv-store/keys/deep" | wc -c)"
  check "$p ... and goes" 200 "$(status_of "$i" DELETE /kv-store/keys/deep)"
  head -c 100000 "$work/deep.json" >"$work/deeper.json"
  expect "$p JSON that never closes" "$(json_error 400 'Body is not a JSON object' PUT)" "$i" PUT /kv-store/keys/deep "${json[@]}" -d "@$work/deeper.json"
}

# ---- HTTP that clients survive ---------------------------------------------------------------------------------------

test_http() { # INSTANCE
  local i=$1 p="HTTP, $1:" bad='400 {"result":"Error","msg":"Bad request"}' length='411 {"result":"Error","msg":"Length required"}'
  local made='201 {"replaced":"False","msg":"New key created"}' set='200 {"replaced":"True","msg":"Value of existing key replaced"}'
  local found='200 {"result":"Success","value":"1"}' gone='404 {"result":"Error","msg":"Key does not exist"}' headers n
  local put='PUT /kv-store/h HTTP/1.1\r\n' get='GET /kv-store/h HTTP/1.1\r\n' end='GET /kv-store/h HTTP/1.1\r\nConnection: close\r\n\r\n'
  expect_raw "$p a new key, kept open, then closed" "$made $found" "$i" "${put}Content-Length: 5\r\n\r\nval=1$end"
  local unparsed='400 {"result":"Error","msg":"Bad request: not HTTP/1.1, or more than 16 headers"}'
  expect_raw "$p not HTTP" "$unparsed" "$i" 'hello\r\n\r\n'
  expect_raw "$p HTTP/2" "$unparsed" "$i" 'GET /kv-store/h HTTP/2.0\r\n\r\n'
  expect_raw "$p not HTTP after two requests" "$found $found $unparsed" "$i" "$get\r\n$get\r\nhello\r\n\r\n"
  for n in 14 15 100; do
    headers=$(printf 'X-%s: y\\r\\n' $(seq "$n"))
    expect_raw "$p $((n + 2)) headers" "$([ "$n" = 14 ] && echo "$found" || echo "$unparsed")" "$i" "${get}Connection: close\r\n$headers\r\n"
  done
  for n in abc -1 +5 0x5 '5, 5' '' 99999999999999999999999; do
    expect_raw "$p Content-Length: $n" "$bad" "$i" "${put}Content-Length: $n\r\n\r\nval=2"
  done
  expect_raw "$p two lengths that differ" "$bad" "$i" "${put}Content-Length: 5\r\nContent-Length: 6\r\n\r\nval=23"
  expect_raw "$p two lengths that agree" "$set" "$i" "${put}Content-Length: 5\r\nContent-Length: 5\r\nConnection: close\r\n\r\nval=1"
  expect_raw "$p a length of a terabyte" "$(form_error 403 'Object too large. Size limit is 1MB')" "$i" "${put}Content-Length: 1000000000000\r\n\r\nval=2"
  expect_raw "$p a chunked body" "$length" "$i" "${put}Transfer-Encoding: chunked\r\n\r\n5\r\nval=2\r\n0\r\n\r\n"
  expect_raw "$p a chunked body after a request" "$found $length" "$i" "$get\r\n${put}Transfer-Encoding: chunked\r\n\r\n5\r\nval=2\r\n0\r\n\r\n"
  expect_raw "$p chunked and a length" "$length" "$i" "${put}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nval=2\r\n0\r\n\r\n"
  expect_raw "$p pipelined requests, the last one closes" "$found $set $found $found" "$i" "$get\r\n${put}Content-Length: 5\r\n\r\nval=1$get\r\n$end"
  check "$p a body of 70 MB on GET" 404 "$(head -c 70000000 /dev/zero | status_of "$i" GET /kv-store/none --data-binary @-)"
  expect_raw "$p bodies on GET and DELETE" "$found $gone $found" "$i" "${get}Content-Length: 5\r\n\r\nval=2DELETE /kv-store/none HTTP/1.1\r\nContent-Length: 5\r\n\r\nval=2$end"
  expect_raw "$p HTTP/1.0" "$found" "$i" 'GET /kv-store/h HTTP/1.0\r\n\r\n'
  expect_raw "$p HTTP/1.0 that wants to stay is closed all the same" "$found" "$i" 'GET /kv-store/h HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n'
  expect_raw "$p a target in absolute form" "$found" "$i" 'GET http://somewhere:99/kv-store/h HTTP/1.1\r\nConnection: close\r\n\r\n'
  expect_raw "$p ... with a query that looks like a path" '404 {"result":"Error","msg":"Not found"}' "$i" 'GET http://somewhere?/kv-store/h HTTP/1.1\r\nConnection: close\r\n\r\n'
  expect_raw "$p ... without a host" "$bad" "$i" 'GET http:///kv-store/h HTTP/1.1\r\n\r\n'
  for n in '' 'Host: a\r\nHost: a\r\n' 'Host: a b\r\n' 'Host: a/b\r\n' 'Host: a:b\r\n' 'Host: user@a\r\n'; do
    expect_raw "$p a host that is none ($n)" "$bad" "$i" "GET /kv-store/h HTTP/1.\x31\r\n$n\r\n"
  done
  for n in '' 'a' 'a:80' '127.0.0.1:80' '[::1]:80' 'a_b.c'; do
    expect_raw "$p the host $n" "$found" "$i" "GET /kv-store/h HTTP/1.\x31\r\nHost: $n\r\nConnection: close\r\n\r\n"
  done
  expect_raw "$p CONNECT" '405 {"error":"Method not allowed","message":"Error in CONNECT"}' "$i" 'CONNECT /kv-store/key-count HTTP/1.1\r\nConnection: close\r\n\r\n'
  expect "$p a body of 20 MB on GET is read and ignored" "$found" "$i" GET /kv-store/h -H Expect: -d "@$work/huge"
  expect "$p a head of 70,000 bytes" "$bad" "$i" GET /kv-store/h -H "X: $(head -c 70000 /dev/zero | tr '\0' x)"
  expect_raw "$p OPTIONS *" '404 {"result":"Error","msg":"Not found"}' "$i" 'OPTIONS * HTTP/1.1\r\nConnection: close\r\n\r\n'
  expect_raw "$p a target that would go on with the host" '404 {"result":"Error","msg":"Not found"}' "$i" "GET @${address[main]}/kv-store HTTP/1.1\r\nConnection: close\r\n\r\n"
  expect_raw "$p asked to continue" "100 $set" "$i" "${put}Expect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\nval=1"
  expect_raw "$p HEAD between other requests" "$found 200 $found" "$i" "$get\r\nHEAD /kv-store/h HTTP/1.1\r\n\r\n$end"
  expect_raw "$p HEAD that is refused" "400" "$i" 'HEAD /kv-store/h HTTP/1.\x31\r\n\r\n'
  expect_raw "$p HEAD with a chunked body" "411" "$i" 'HEAD /kv-store/h HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n'
  check "$p HEAD gives the length that GET has" "$(curl -s -o /dev/null -w '%header{content-length}' "${url[$i]}/kv-store/h")" \
    "$(curl -s -I -m 5 -w '%header{content-length}' -o /dev/null "${url[$i]}/kv-store/h")"
  check "$p half a body is no request" "" "$(raw_abandoned "$i" "${put}Content-Length: 500\r\n\r\nval=2")"
  check "$p ... for any verb" "" "$(raw_abandoned "$i" "DELETE /kv-store/h HTTP/1.1\r\nContent-Length: 500\r\n\r\nval=2")"
  expect "$p none of it changed the value" "$found" "$i" GET /kv-store/h
  check "$p ... and it goes" 200 "$(status_of "$i" DELETE /kv-store/h)"
}
# raw_abandoned INSTANCE BYTES: sends bytes and leaves.
raw_abandoned() {
  local host=${url[$1]#http://}
  # shellcheck disable=SC2059
  (exec 3<>"/dev/tcp/${host%:*}/${host#*:}" && printf "$(with_hosts "$2")" >&3)
}

test_pipelines() { # INSTANCE
  local puts='' n
  for n in {0..499}; do puts+="PUT /kv-store/p HTTP/1.1\r\nContent-Length: 5\r\n\r\nval=$((n % 10))"; done
  check "pipelines, $1: 500 PUTs in one go" "1 499 1" "$(raw "$1" "${puts}GET /kv-store/p HTTP/1.1\r\nConnection: close\r\n\r\n" |
    awk '/^HTTP\/1.1 201/ { a++ } /True/ { b++ } /"value":"9"/ { c++ } END { print a, b, c }')"
  check "pipelines, $1: ... and it goes" 200 "$(status_of "$1" DELETE /kv-store/p)"
  local host=${url[$1]#http://}
  check "pipelines, $1: values of the limit, one after the other" "1 3 4" "$({
    exec 3<>"/dev/tcp/${host%:*}/${host#*:}"
    { for n in 1 2 3 4; do
      printf 'PUT /kv-store/p HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n' "$(wc -c <"$work/full")"
      cat "$work/full"
    done && printf 'DELETE /kv-store/p HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n'; } >&3 &
    timeout 8 cat <&3
  } | awk '/^HTTP\/1.1 201/ { a++ } /True/ { b++ } /^HTTP\/1.1 200/ { c++ } END { print a, b, c }')"
}

# connect INSTANCE: opens a connection; its descriptor is in $fd.
connect() {
  local host=${url[$1]#http://}
  exec {fd}<>"/dev/tcp/${host%:*}/${host#*:}"
}
open_idle_clients() { # INSTANCE
  local n
  idle=()
  for ((n = 0; n < IDLE_CLIENTS; n++)); do
    connect "$1"
    idle+=("$fd")
  done
  idle_since=$(now)
}
test_idle_clients() { # INSTANCE
  check "idle, $1: others are served beside $IDLE_CLIENTS idle clients" 200 "$(status_of "$1" GET /kv-store)"
  local fd open=0 deadline=$((idle_since + 90000)) left
  for fd in "${idle[@]}"; do
    left=$((deadline - $(now)))
    [ "$left" -gt 0 ] || left=1
    read -r -n 1 -t "$((left / 1000)).$(printf %03d $((left % 1000)))" _ <&"$fd"
    [ $? -eq 1 ] || open=$((open + 1))
    exec {fd}>&-
  done
  check "idle, $1: all of them were sent away after 75 seconds" 0 "$open"
}

test_endless_head() { # INSTANCE
  local host=${url[$1]#http://}
  # Its bytes are valid ones: what is no HTTP at all would be refused at once, whatever the limit. They are not quite endless,
  # so that a server without a limit does not take all memory. Reading tells that the connection is ended: writing may not,
  # since what the server left unread can keep the window shut, and a writer then waits for a reset that does not come.
  check "endless head, $1: the connection is ended" ended "$({
    exec 3<>"/dev/tcp/${host%:*}/${host#*:}"
    printf 'GET / HTTP/1.1\r\nX: ' >&3
    head -c 250000000 /dev/zero | timeout 10 tr '\0' x >&3 &
    timeout 8 cat <&3 >"$work/endless"
    [ $? -eq 124 ] && echo open || echo ended
    kill $!
  } 2>/dev/null)"
  check_that "endless head, $1: memory stays under 64 MiB" "$(status_field "$1" VmHWM) < 65536"
  check "endless head, $1: others are served" 200 "$(status_of "$1" GET /kv-store)"
}

# Clients that send one request after the other, without end, and read all answers.
test_endless_pipelines() { # INSTANCE
  local host=${url[$1]#http://} n times
  for n in {1..8}; do
    {
      exec 3<>"/dev/tcp/${host%:*}/${host#*:}"
      cat <&3 >/dev/null &
      yes $'GET /kv-store/none HTTP/1.1\r\nHost: test\r\n\r' | timeout 4 cat >&3
      kill $!
    } 2>/dev/null &
    clients[n]=$!
  done
  sleep 0.5
  times=$(for n in {1..20}; do curl -s -o /dev/null -m 5 -w '%{http_code} %{time_total}\n' "${url[$1]}/kv-store/none"; done)
  check "endless pipelines, $1: others are answered in less than a second" "20" "$(awk '$1 == 404 && $2 < 1' <<<"$times" | wc -l)"
  wait "${clients[@]}"
}

# gets COUNT KEY: so many requests for a key (three lines each), to be sent in one go.
gets() { yes "GET /kv-store/$2 HTTP/1.1"$'\r\nHost: test\r\n\r' | head -n $(($1 * 3)); }

# Clients that have one large answer after the other made, and leave in the middle of them; the instance stays the same process.
test_clients_that_leave() { # INSTANCE
  local host=${url[$1]#http://} before n
  before=$("process_id_$mode" "$1")
  head -c 100000 /dev/zero | tr '\0' v | sed 's/^/val=/' >"$work/leave"
  status_of "$1" PUT /kv-store/leave -d "@$work/leave" >/dev/null
  # After each three such answers others have their turn, and after the last ones this client is gone.
  local gets
  gets=$(gets 30 leave)$'\n'
  for n in {1..8}; do
    for _ in {1..200}; do
      exec 3<>"/dev/tcp/${host%:*}/${host#*:}" && printf %s "$gets" >&3
      exec 3>&-
    done 2>/dev/null &
    clients[n]=$!
  done
  wait "${clients[@]}"
  check "clients that leave, $1: it goes on" "$before 200" "$("process_id_$mode" "$1") $(status_of "$1" DELETE /kv-store/leave)"
}

# Many large answers at once by way of a follower; both instances stay the same processes.
test_large_answers() {
  local before n
  before="$("process_id_$mode" main) $("process_id_$mode" follower)"
  status_of main PUT /kv-store/large -d "@$work/full" >/dev/null
  for _ in {1..4}; do
    for n in {1..150}; do
      curl -s -m 30 -o /dev/null -w '%{http_code} %{size_download}\n' "${url[follower]}/kv-store/large" >"$work/large.$n" &
      clients[n]=$!
    done
    wait "${clients[@]}"
    check "large answers: 150 at once through a follower" "150 200 $((LIMIT + 32))" "$(cat "$work"/large.* | sort | uniq -c | xargs)"
  done
  check "large answers: the instances go on" "$before 200 200" \
    "$("process_id_$mode" main) $("process_id_$mode" follower) $(status_of main GET /kv-store) $(status_of follower DELETE /kv-store/large)"
}

# Clients that ask for large values and read nothing.
test_unread_answers() {
  local n fds=()
  start greedy
  check "unread answers: there is something to read" 201 "$(status_of greedy PUT /kv-store/big -d "@$work/full")"
  gets 200 big >"$work/gets"
  printf 'GET /kv-store HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n' >>"$work/gets"
  connect greedy
  cat "$work/gets" >&"$fd"
  check_that "unread answers: 200 large ones to a pipeline" "$(wc -c <&"$fd") > $((200 * LIMIT))"
  exec {fd}>&-
  check_that "unread answers: ... of which few are kept at a time (KiB)" "$(status_field greedy VmHWM) < 65536"
  for n in {1..150}; do
    connect greedy
    for _ in {1..5}; do printf 'GET /kv-store/big HTTP/1.1\r\nHost: test\r\n\r\n' >&"$fd" || break; done
    fds+=("$fd")
  done 2>/dev/null
  sleep 1
  check_that "unread answers: memory stays under 64 MiB" "$(status_field greedy VmHWM) < 65536"
  check "unread answers: who reads gets them" "$((LIMIT + 1))" "$(curl -s -m 10 "${url[greedy]}/kv-store/big" | tr -dc v | wc -c)"
  for fd in "${fds[@]}"; do exec {fd}>&-; done
}

# open_stream INSTANCE: opens a stream as other instances do: the GET of its answers on descriptor `answers`, and the POST of its
# questions on descriptor `fd`.
open_stream() {
  local id=$RANDOM$RANDOM$RANDOM line
  local head=("/kv-store?stream=$id HTTP/1.1" 'Host: test' 'Content-Type: application/x-kv-store-stream')
  connect "$1" && answers=$fd
  printf '%s\r\n' "GET ${head[0]}" "${head[@]:1}" '' >&"$answers"
  read -r -t 5 -u "$answers" line && [ "$line" = $'HTTP/1.1 200 OK\r' ] || return 1
  connect "$1"
  printf '%s\r\n' "POST ${head[0]}" "${head[@]:1}" 'Content-Length: 1000000000' '' >&"$fd"
}

# big_questions COUNT: asks for the key `big` so many times. A message: its length, a number, the time, 1, and the request.
big_questions() { local n && for ((n = 0; n < $1; n++)); do printf '\x19\0\0\0\x01\0\x01\x03GET\x0d/kv-store/big\0\0\0\0'; done; }

# Streams on which large values are asked for and nothing is read.
test_unread_streams() {
  local instance fds answers
  start flooded && start relaying FORWARDING_ADDRESS="${address[flooded]}"
  check "unread streams: there is something to read" 201 "$(status_of relaying PUT /kv-store/big -d "@$work/full")"
  big_questions 500 >"$work/stream"
  for instance in flooded relaying; do
    fds=()
    for _ in {1..20}; do open_stream "$instance" && cat "$work/stream" >&"$fd" && fds+=("$fd" "$answers"); done
    check "unread streams, $instance: they are streams" 40 ${#fds[@]}
    sleep 1
    check "unread streams, $instance: others are answered meanwhile" 200 "$(status_of "$instance" GET /kv-store)"
    for fd in "${fds[@]}"; do exec {fd}>&-; done
    await_less "unread streams, $instance: with the clients, the memory goes" 65536 status_field "$instance" VmRSS
  done
  check_that "unread streams: memory stays under 128 MiB" "$(status_field flooded VmHWM) < 131072"
  check_that "unread streams: ... and little over it where answers come that were asked for before" "$(status_field relaying VmHWM) < 524288"
}

# Streams that are left while what they asked for takes its time: nothing is kept open for them.
test_streams_that_leave_local() {
  local files answers opened=0
  files=$(find "/proc/${process[follower]}/fd" | wc -l)
  pause_local main
  for _ in {1..300}; do
    open_stream follower && big_questions 1 >&"$fd" && opened=$((opened + 1))
    exec {fd}>&- {answers}>&-
  done
  check "streams that leave: they were streams" 300 "$opened"
  await_less "streams that leave: ... and leave no files open" $((files + 100)) files_of follower
  resume_local main
}

files_of() { find "/proc/${process[$1]}/fd" | wc -l; }

# Clients that have read a large value and then rest: no new one makes the instance keep more.
test_resting_clients() {
  local n fds=()
  start resting
  ask resting PUT /kv-store/big -d "@$work/full" >/dev/null
  for n in {1..250}; do
    connect resting
    printf 'GET /kv-store/big HTTP/1.1\r\nHost: test\r\n\r\n' >&"$fd"
    head -c "$LIMIT" <&"$fd" >/dev/null
    fds+=("$fd")
  done
  check_that "resting clients: memory stays under 64 MiB beside $n that read a value of the limit" "$(status_field resting VmRSS) < 65536"
  for fd in "${fds[@]}"; do exec {fd}>&-; done
}
# await_less WHAT LIMIT COMMAND...: soon, the command prints less.
await_less() {
  poll is_less "${@:2}"
  check_that "$1" "$("${@:3}") < $2"
}
is_less() { [ "$("${@:2}")" -lt "$1" ]; }

# Nobody reads stderr: the lines are lost, and not the instance.
test_unread_stderr_local() {
  local n
  mkfifo "$work/unheard.log"
  exec {fd}<>"$work/unheard.log"
  start unheard
  for n in {1..3000}; do
    (printf 'hello\r\n\r\n' >"/dev/tcp/${address[unheard]/://}") 2>/dev/null
  done
  check "unread stderr: others are served after $n malformed requests" 200 "$(status_of unheard GET /kv-store)"
  exec {fd}>&-
}

# ---- A follower and its main instance --------------------------------------------------------------------------------

test_instances() {
  expect "main says what it is" '200 {"result":"Success","role":"main","version":"2.0.0","key-count":0}' main GET /kv-store
  expect "... with a slash too" '200 {"result":"Success","role":"main","version":"2.0.0","key-count":0}' main GET /kv-store/
  expect "follower says what it is" "200 {\"result\":\"Success\",\"role\":\"follower\",\"version\":\"2.0.0\",\"forwarding-address\":\"${address[main]}\"}" follower GET /kv-store
  expect "key count of an empty store" '200 {"message":"Key count retrieved successfully","key-count":0}' main GET /kv-store/key-count
  status_of main PUT /kv-store/one -d val=1 >/dev/null
  expect "key count through a follower" '200 {"message":"Key count retrieved successfully","key-count":1}' follower GET /kv-store/key-count
  check "what the follower wrote, main has" "201 200" "$(status_of follower PUT /kv-store/two -d val=2) $(status_of main GET /kv-store/two)"
  check "a follower of a follower relays" "200 200" "$(status_of second PUT /kv-store/two -d val=3) $(status_of second DELETE /kv-store/two)"
  status_of main DELETE /kv-store/one >/dev/null
}

# The same questions to main and to a follower: answers are compared byte by byte, with all of their heads but the date.
# metric INSTANCE NAME: its value, by its name and labels as they stand in the text.
metric() { curl -s -m 10 "${url[$1]}/metrics" | awk -v name="kv_store_$2" '$1 == name { print $2 }'; }

test_metrics() {
  local gets puts refused bytes keys relays
  check "metrics: a type of their own" "200 text/plain; version=0.0.4" "$(ask main GET /metrics | head -n 1 | cut -d ' ' -f 1-3)"
  expect "metrics: a verb that they do not take" "$(form_error 405 'Method not allowed')" main PUT /metrics -d val=1
  check "metrics: each has its help and type" 0 "$(curl -s "${url[main]}/metrics" | awk '$1 == "#" { known[$3]++; next } { sub(/{.*/, "", $1); if (known[$1] != 2) wrong++ } END { print wrong + 0 }')"
  if command -v promtool >/dev/null; then
    check "metrics: promtool has no complaint" "" "$(curl -s "${url[main]}/metrics" | promtool check metrics 2>&1)"
  fi
  gets=$(metric main 'requests_total{verb="GET",class="2xx"}')
  puts=$(metric main 'requests_total{verb="PUT",class="2xx"}')
  refused=$(metric main 'requests_total{verb="PUT",class="4xx"}')
  bytes=$(metric main value_bytes) keys=$(metric main keys) relays=$(metric follower relays_total)
  ask main PUT /kv-store/metric -d val=123 >/dev/null
  ask follower PUT /kv-store/metric -d val=12345 >/dev/null
  ask main PUT /kv-store/metric >/dev/null
  check "metrics: requests are counted, not those of a follower's clients" "$((puts + 1)) $((refused + 1))" "$(metric main 'requests_total{verb="PUT",class="2xx"}') $(metric main 'requests_total{verb="PUT",class="4xx"}')"
  check_that "metrics: asking for them is counted" "$(metric main 'requests_total{verb="GET",class="2xx"}') > $gets"
  check "metrics: keys and the bytes of their values" "$((keys + 1)) $((bytes + 7))" "$(metric main keys) $(metric main value_bytes)"
  check "metrics: relays are counted, and have not failed" "$((relays + 1)) 0" "$(metric follower relays_total) $(metric follower relay_failures_total)"
  check_that "metrics: connections, of which this is one" "$(metric main connections) > $IDLE_CLIENTS"
  ask main DELETE /kv-store/metric >/dev/null
  check "metrics: what is deleted counts no more" "$keys $bytes" "$(metric main keys) $(metric main value_bytes)"
}

test_follower_is_no_different() {
  local -a questions=('' '-I' '-X PUT -d val=1' '-X PUT' '-X PUT -d val=%ff' '-X DELETE' '-X POST' '-X OPTIONS' '-H Content-Type:application/json -X PUT -d {}')
  local path question before
  for path in /kv-store/same /kv-store/keys/same /kv-store/key-count /kv-store/view-change /kv-store/a/b / '/kv-store/same?val=2'; do
    for question in "${questions[@]}"; do
      for before in '-X PUT -d val=1' '-X DELETE'; do
        check "main and follower alike: $question $path after $before" \
          "$(answer_after "$before" main "$question" "$path")" "$(answer_after "$before" follower "$question" "$path")"
      done
    done
  done
  status_of main DELETE /kv-store/same >/dev/null
}
answer_after() { # CURL-ARGUMENTS-BEFORE INSTANCE CURL-ARGUMENTS PATH
  # shellcheck disable=SC2086 # arguments are words
  curl -s -m 5 -o /dev/null $1 "${url[main]}/kv-store/same"
  # shellcheck disable=SC2086
  curl -s -i -m 5 $3 "${url[$2]}$4" | grep -v ^Date
}

test_main_paused() {
  local n began lasted slowest=0 line=
  "pause_$mode" main
  for n in {1..200}; do
    curl -s -m 10 -o /dev/null -w '%{http_code} %{time_total} %{errormsg}\n' "${url[follower]}/kv-store/k$n" >"$work/paused.$n" &
    clients[n]=$!
  done
  sleep 1
  for n in {1..10}; do
    began=$(now)
    curl -s -m 10 -o /dev/null "${url[follower]}/kv-store"
    lasted=$(($(now) - began))
    [ "$lasted" -le "$slowest" ] || slowest=$lasted
  done
  check_that "main paused: the follower itself answers at once beside 200 waiting clients (ms)" "$slowest < 500"
  check_that "main paused: the follower's threads are bounded" "$(status_field follower Threads) < 100"
  connect follower
  printf 'GET %s HTTP/1.1\r\nHost: test\r\n\r\n' /kv-store /kv-store/foo >&"$fd"
  IFS= read -r -t 2 line <&"$fd"
  check "main paused: an answer does not wait for the next one" "HTTP/1.1 200 OK" "${line%$'\r'}"
  exec {fd}>&-
  wait "${clients[@]}"
  check "main paused: every client gets the error" "200 501" "$(cut -d ' ' -f 1,3- "$work"/paused.* | sort | uniq -c | xargs)"
  check "main paused: ... within 5 s" 0 "$(cat "$work"/paused.* | awk '$2 > 5.4' | wc -l)"
  expect "main paused: the error in JSON" "$(json_error 503 'Main instance is down' DELETE)" follower DELETE /kv-store/keys/foo
  "resume_$mode" main
  expect "main resumed: the next request works" "$(form_error 404 'Key does not exist')" follower GET /kv-store/foo
}

test_main_gone() {
  local began
  "stop_$mode" main
  check "main stopped: it ends with status 0" 0 "$ended"
  began=$(now)
  expect "main gone: the error" "$(form_error 501 'Server unavailable')" follower PUT /kv-store/foo -d val=1
  check_that "main gone: ... within 1.5 s (ms)" "$(now) - $began < 2500"
  expect "main gone: the error in JSON" "$(json_error 503 'Main instance is down' GET)" follower GET /kv-store/keys/foo
  expect "main gone: the error of a path that may not exist" "$(form_error 501 'Server unavailable')" follower GET /nowhere
  expect "main gone: keys that need another way" "$(json_error 503 'Main instance is down' GET)" second GET /kv-store/keys/.. --path-as-is
  expect "main gone: a follower of the follower says the same" "$(form_error 501 'Server unavailable')" second GET /kv-store/foo
  check "main gone: the follower itself answers" 200 "$(status_of follower GET /kv-store)"
  expect "main gone: HTTP errors are the follower's own" "$(json_error 413 'Value is too large' PUT)" follower PUT /kv-store/keys/x "${json[@]}" -H Expect: -d "@$work/huge"
  restart main
  check "main back: the next request works" 201 "$(status_of follower PUT /kv-store/foo -d val=1)"
  expect "main back: keys that need another way" '404 {"doesExist":false,"error":"Key does not exist","message":"Error in GET"}' second GET /kv-store/keys/.. --path-as-is
  check "main back: ... and it was stored there, once" "200 1" "$(status_of main GET /kv-store/foo) $(count main)"
}

test_ring() {
  "address_$mode" ring1 && "address_$mode" ring2
  start ring1 FORWARDING_ADDRESS="${address[ring2]}"
  start ring2 MAINIP="${address[ring1]}"
  local began
  began=$(now)
  expect "a ring of followers answers the error" "$(form_error 501 'Server unavailable')" ring1 PUT /kv-store/foo -d val=1
  check_that "a ring of followers is told apart from a main instance that hangs (ms)" "$(now) - $began < 2500"
}

test_follower_killed() {
  "kill_$mode" follower
  check "follower killed: main answers" 200 "$(status_of main GET /kv-store/foo)"
  restart follower
  check "follower back: it relays" 200 "$(status_of follower GET /kv-store/foo)"
}

# Writers on main and on both followers at once, each with keys of its own.
test_concurrent_clients() {
  local n
  for n in {1..12}; do
    write_and_count "$n" >"$work/writer.$n" &
    clients[n]=$!
  done
  wait "${clients[@]}"
  check "12 clients write 50 keys each through three instances" "600 made" "$(awk '{ made += $1 } END { print made " made" }' "$work"/writer.*)"
  check "... and all of them are there" 600 "$(($(count main) - 1))"
}
write_and_count() { # NUMBER
  local -a instances=(main follower second)
  local base=${url[${instances[$1 % 3]}]}/kv-store/w$1
  curl -s -m 30 -X PUT -d val=1 -w '%{http_code}\n' -o /dev/null "${base}_[1-50]" | grep -c 201
}

# ---- A store of several nodes ----------------------------------------------------------------------------------------

# start_node NODE [VARIABLE=VALUE...]: its address must have been fixed.
start_node() { start "$1" ADDRESS="${address[$1]}" "${@:2}"; }
# view NODE...: their addresses, separated by commas.
view() {
  local node list=()
  for node in "$@"; do list+=("${address[$node]}"); done
  (IFS=, && echo "${list[*]}")
}
# change NODE BODY: asks a node for a view change; prints status and body.
change() { curl -s -m 40 -X PUT -w ' %{http_code}' "${json[@]}" -d "$2" "${url[$1]}/kv-store/view-change" | tr -d '\n'; }
change_to() { change "$1" "{\"view\":\"$(view "${@:2}")\"}"; }
count() { ask "$1" GET /kv-store/key-count | sed -n 's/.*"key-count":\([0-9]*\).*/\1/p'; }
counts() {
  local node list=()
  for node in "$@"; do list+=("$(count "$node")"); done
  echo "${list[*]}"
}
view_of() { ask "$1" GET /kv-store | grep -o '"view":\[[^]]*\]' | cut -d : -f 2- | tr -d '[]"'; }
# write NODE PREFIX COUNT / found NODE PREFIX COUNT: puts keys; says how many are there, with their values.
write() { curl -s -m 40 -X PUT "${json[@]}" -d "{\"value\":\"of $2\"}" -w '%{http_code}\n' -o /dev/null "${url[$1]}/kv-store/keys/$2[1-$3]" | grep -c '^20[01]'; }
found() { curl -s -m 40 "${url[$1]}/kv-store/keys/$2[1-$3]" | grep -c "\"value\":\"of $2\""; }
# balanced COUNTS / sum COUNTS: whether any two differ by one at most; what they add up to.
balanced() { tr ' ' '\n' <<<"$1" | sort -n | awk 'NR == 1 { least = $1 } END { print ($1 - least <= 1) ? "balanced" : "not balanced" }'; }
sum() { tr ' ' '\n' <<<"$1" | awk '{ s += $1 } END { print s }'; }
total() { sum "$(counts "$@")"; }
# shards ANSWER: the counts in the answer of a view change, and its moved.
shards() { grep -o '"key-count":[0-9]*' <<<"$1" | cut -d : -f 2 | paste -sd' '; }
moved() { grep -o '"moved":[0-9]*' <<<"$1" | cut -d : -f 2; }
# shard ID NODE COUNT: a shard in the answer of a view change.
shard() { echo "{\"shard-id\":\"$1\",\"address\":\"${address[$2]}\",\"replicas\":[\"${address[$2]}\"],\"key-count\":$3}"; }
# await WHAT EXPECTED COMMAND...: checks what a command says until it says what is expected, for 10 s at most.
await() {
  local deadline=$(($(now) + 10000)) got
  while got=$("${@:3}") && [ "$got" != "$2" ] && [ "$(now)" -lt "$deadline" ]; do sleep 0.05; done
  check "$1" "$2" "$got" "${*:3}"
}

test_nodes() {
  local node answer in_order id
  for node in n1 n2 n3 n4; do "address_$mode" "$node"; done
  start_node n1 VIEW="$(view n1 n2)"
  status_of n1 PUT /kv-store/keys/early "${json[@]}" -d '{"value":1}' >"$work/early" &
  clients=($!)
  start_node n2 VIEW="$(view n1 n2)" && start_node n3 && start_node n4
  wait "${clients[@]}"
  check "nodes: a request that comes before the last node is up waits for it" 201 "$(cat "$work/early")"
  await "nodes: both answer for their keys" 200 status_of n2 DELETE /kv-store/keys/early
  check "nodes: n1 is healthy" 0 "$("health_$mode" n1)"
  await "nodes: n1 says what it is" "200 {\"result\":\"Success\",\"role\":\"node\",\"version\":\"2.0.0\",\"address\":\"${address[n1]}\",\"view\":[\"$(view n1 n2 | sed 's/,/","/')\"],\"key-count\":0,\"shard-id\":\"1\",\"repl-factor\":1,\"table-version\":\"0.0\",\"incoming\":[],\"silent\":[]}" ask n1 GET /kv-store
  check "nodes: 60 keys through n1 and 60 through n2" "60 60" "$(write n1 a 60) $(write n2 b 60)"
  check "nodes: the key counts add up" 120 "$(total n1 n2)"
  check "nodes: every key is found through every node" "60 60 60 60" "$(found n1 a 60) $(found n1 b 60) $(found n2 a 60) $(found n2 b 60)"
  check "nodes: n2's address is in the answers that n1 relays" "$(count n2)" "$(curl -s "${url[n1]}/kv-store/keys/[a-b][1-60]" | grep -c "\"address\":\"${address[n2]}\"")"
  check "nodes: n1's own answers have no address" "$(count n1)" "$(curl -s "${url[n1]}/kv-store/keys/[a-b][1-60]" | grep -vc address)"
  check "nodes: the form vocabulary has no address" 0 "$(curl -s "${url[n1]}/kv-store/[a-b][1-60]" | grep -c address)"
  check "nodes: errors of the owner are passed on, with its address" "$(count n2) n2" \
    "$(curl -s -X PUT "${json[@]}" -d '{}' "${url[n1]}/kv-store/keys/[a-b][1-60]" | grep -c "Value is missing.*${address[n2]}") n2"
  check "nodes: a relayed key may be odd" "201 200 200" "$(for verb in PUT GET DELETE; do status_of n1 "$verb" /kv-store/keys/.. --path-as-is "${json[@]}" -d '{"value":1}'; done | paste -sd' ')"
  (printf '{"value":1' && head -c 4194293 /dev/zero | tr '\0' ' ' && printf '}') >"$work/padded"
  check "nodes: a body of 4 MiB reaches the owner through another node" "201 200" "$(for node in n1 n2; do status_of "$node" PUT /kv-store/keys/padded "${json[@]}" -d "@$work/padded"; done | paste -sd' ')"
  check "nodes: ... and is deleted" 200 "$(status_of n1 DELETE /kv-store/keys/padded)"

  answer=$(change_to n1 n1 n2 n3)
  in_order="{\"message\":\"View change successful\",\"moved\":40,\"shards\":[$(shard 1 n1 40),$(shard 2 n2 40),$(shard 3 n3 40)]} 200"
  check "join: the answer" "$in_order" "$answer"
  check "join: the nodes have what the answer says" "40 40 40" "$(counts n1 n2 n3)"
  expect "shards: all of them" '200 {"message":"Shard membership retrieved successfully","shards":["1","2","3"]}' n3 GET /kv-store/shards
  expect "shards: one, asked through another node" "200 {\"message\":\"Shard information retrieved successfully\",\"shard-id\":\"2\",\"key-count\":40,\"replicas\":[\"${address[n2]}\"]}" n1 GET /kv-store/shards/2
  expect "shards: ... through its own node" "200 {\"message\":\"Shard information retrieved successfully\",\"shard-id\":\"2\",\"key-count\":40,\"replicas\":[\"${address[n2]}\"]}" n2 GET /kv-store/shards/2
  for id in 0 4 02 +2 x ''; do
    expect "shards: no shard '$id'" "$(json_error 404 'Shard does not exist' GET)" n1 GET "/kv-store/shards/$id"
  done
  expect "shards: a verb that they do not take" "$(json_error 405 'Method not allowed' PUT)" n1 PUT /kv-store/shards -d val=1
  expect "shards: the count says whose it is" '200 {"message":"Key count retrieved successfully","key-count":40,"shard-id":"3"}' n3 GET /kv-store/key-count
  check "log: a node says which table it adopts" 1 "$("log_$mode" n3 | grep -c 'goes by table 0.1 of 3 nodes, fetches from .*:')"
  check "log: ... and when it has everything" 1 "$("log_$mode" n3 | grep -c 'has everything of table 0.1')"
  check "join: only the joining node's keys moved" 40 "$(moved "$answer")"
  check "join: every key is found through every node" "60 60 60 60 60 60" "$(for node in n1 n2 n3; do found "$node" a 60 && found "$node" b 60; done | paste -sd' ')"
  check "join: every node has the view" "$(view n1 n2 n3) $(view n1 n2 n3) $(view n1 n2 n3)" "$(view_of n1) $(view_of n2) $(view_of n3)"
  check "the same view again moves nothing" 0 "$(moved "$(change_to n3 n1 n2 n3)")"
  answer=$(change n2 "{\"view\":[\"${address[n4]}\",\"${address[n3]}\",\"${address[n2]}\"]}")
  check "one leaves, one joins, as a JSON array: 40 keys move" 40 "$(moved "$answer")"
  check "one leaves, one joins: the counts" "0 40 40 40" "$(counts n1 n2 n3 n4)"
  expect "one leaves, one joins: the one that left has no shard" '200 {"message":"Key count retrieved successfully","key-count":0}' n1 GET /kv-store/key-count
  check "one leaves, one joins: the one that left relays" "60 60" "$(found n1 a 60) $(found n1 b 60)"
  check "one leaves, one joins: it can be asked for a view change" "30 30 30 30" "$(shards "$(change_to n1 n1 n2 n3 n4)")"
  check "deletes: 50 keys go" 50 "$(curl -s -X DELETE "${url[n3]}/kv-store/keys/a[1-50]" | grep -c Deleted)"
  answer=$(change_to n2 n1 n2 n3 n4)
  check "... and the same view evens out what drifted" "balanced 70" "$(balanced "$(shards "$answer")") $(total n1 n2 n3 n4)"
  check "down to one node" "70 70 0 0 0" "$(shards "$(change_to n4 n1)") $(counts n1 n2 n3 n4)"
  check "... and up to two" "35 35" "$(shards "$(change_to n4 n1 n2)")"
  check "... and back to three" "balanced 70" "$(change_to n1 n1 n2 n3 >/dev/null && balanced "$(counts n1 n2 n3)") $(total n1 n2 n3)"
}

test_few_keys() { # one node grows to three with so many keys
  local keys
  for keys in 0 1 7; do
    check "few keys: $keys keys on one node" "$keys" "$(one_node_with "$keys" && count n1)"
    check "few keys: ... on three" "balanced $keys" "$(change_to n1 n1 n2 n3 >/dev/null && balanced "$(counts n1 n2 n3)") $(total n1 n2 n3)"
    check "few keys: ... are found" "$keys" "$(found n3 f $((keys + 1)))"
  done
  clear_store n1
  change_to n1 n1 n2 n3 >/dev/null
  check "few keys: an empty store gives each node its share" "300" "$(write n1 e 300)"
  check_that "few keys: ... of new keys" "$(counts n1 n2 n3 | tr ' ' '\n' | sort -n | head -n 1) > 60"
  for keys in 1 5; do
    clear_store n1
    curl -s -o /dev/null -X DELETE "${url[n1]}/kv-store/keys/e[1-300]"
    check "few keys: $keys again" "$keys" "$(one_node_with "$keys" && count n1)"
    check "few keys: ... and 300 more on three nodes" "300" "$(change_to n1 n1 n2 n3 >/dev/null && write n1 e 300)"
    check_that "few keys: ... spread" "$(counts n1 n2 n3 | tr ' ' '\n' | sort -n | head -n 1) > 35"
  done
  clear_store n1
  curl -s -o /dev/null -X DELETE "${url[n1]}/kv-store/keys/e[1-300]"
}
one_node_with() { # KEYS
  change_to n1 n1 >/dev/null
  clear_store n1
  if [ "$1" -gt 0 ]; then write n2 f "$1" >/dev/null; fi
}
clear_store() { curl -s -o /dev/null -X DELETE "${url[$1]}/kv-store/keys/[a-f][1-60]"; }

view_and_counts() { echo "$(view_of n1) $(counts n1 n2 n3)"; }
agreement() { # NODE...: "agreed" if all have the same view
  local node
  for node in "$@"; do view_of "$node"; done | sort -u | awk '{ views = views $0 " " } END { print NR == 1 ? "agreed" : views }'
}
test_refused_view_changes() {
  local before answer n
  before=$(view_and_counts)
  expect "refused: no view" "$(json_error 400 'View is missing' PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d '{}'
  expect "refused: no body" "$(json_error 400 'View is missing' PUT)" n1 PUT /kv-store/view-change
  expect "refused: an address that is none" "$(json_error 400 "View is not valid: 'n1' is not host:port" PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d '{"view":"n1"}'
  expect "refused: an address given twice" "$(json_error 400 'View is not valid: a:1 is given twice' PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d '{"view":"a:1,a:1"}'
  expect "refused: an empty view" "$(json_error 400 "View is not valid: '' is not host:port" PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d '{"view":""}'
  expect "refused: a view that is a number" "$(json_error 400 'View is not valid: it is neither a string nor an array of strings' PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d '{"view":1}'
  expect "refused: force that is no boolean" "$(json_error 400 "View is not valid: force is 'true', neither true nor false" PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view n1 n2 n3)\",\"force\":\"true\"}"
  expect "refused: not JSON" "$(json_error 400 'Body is not a JSON object' PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d 'view'
  expect "refused: a node that is not there" "$(json_error 503 'Node 127.0.0.1:1 is down' PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view n1),127.0.0.1:1\"}"
  "address_$mode" other && start_node other
  await "refused: (another store has a key)" 201 status_of other PUT /kv-store/key -d val=1
  expect "refused: a node with keys of another store" "$(json_error 409 "Node ${address[other]} holds keys of another store" PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view n1 n2 n3 other)\"}"
  check "refused: ... which keeps them" "200 $(view other)" "$(status_of other GET /kv-store/key) $(view_of other)"
  "address_$mode" fellow && start_node fellow
  check "refused: (the other store grows)" "1 0" "$(shards "$(change_to other other fellow)")"
  expect "refused: a node of another store that goes on without it" "$(json_error 409 "Node ${address[fellow]} holds keys of another store" PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view n1 n2 n3 fellow)\"}"
  local alias=localhost:${address[n4]##*:}
  [ "$mode" = local ] || alias=$(docker inspect -f "{{(index .NetworkSettings.Networks \"$name\").IPAddress}}" "${process[n4]}"):8080
  expect "refused: a node by another name than its own" "$(json_error 503 "Node $alias is down" PUT)" n1 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view n1 n2 n3),$alias\"}"
  check "refused: nothing has changed" "$before" "$(view_and_counts)"
  for n in 1 2 3 4 5 6; do
    change_to "n$((n % 3 + 1))" n1 n2 n3 >"$work/change.$n" &
    clients[n]=$!
  done
  wait "${clients[@]}"
  answer=$(grep -h -o '...$' "$work"/change.* | sort -u | paste -sd' ')
  check "six at once: each is done or told that another is in progress" "200" "${answer% 409}"
  await "six at once: nothing has changed" "$before" view_and_counts
}

# ask_on_stream INSTANCE REQUEST: opens a stream, asks one thing on it (a request in the form that it has between instances) and prints
# the status of the answer.
ask_on_stream() {
  local fd answers reader
  open_stream "$1" || return
  length=$((3 + $(printf '%b' "$2" | wc -c)))
  cat <&"$answers" >"$work/answers" &
  reader=$!
  # The length, the number 1, the time 0, and that something follows.
  printf '%b' "\\x$(printf %02x $((length % 256)))\\x$(printf %02x $((length / 256)))\\0\\0\\x01\\0\\x01$2" >&"$fd"
  poll is_over "$reader" && status_on_stream | grep . || echo "no answer"
  kill "$reader" 2>/dev/null
  exec {fd}>&- {answers}>&-
}

is_over() { ! kill -0 "$1" 2>/dev/null || [ -n "$(status_on_stream)" ]; }

# The status of the answer with the number 1. Number, time and status are in bytes of seven bits; messages with the number 0 are
# heartbeats.
status_on_stream() {
  sed '1,/^\r$/d' "$work/answers" | od -An -v -tu1 -w1 | awk '
    { byte[n++] = $1 }
    END {
      at = 0
      while (at < n && byte[at + 4] != 1) at += 4 + byte[at] + 256 * byte[at + 1]
      time = at + 5
      while (byte[time] >= 128) time++
      if (time + 3 < n) print byte[time + 2] % 128 + 128 * byte[time + 3]
    }'
}

# name TEXT: as it stands in a message.
name() { printf '\\x%02x%s' "${#1}" "$1"; }
# greeting FROM TO: who says it and to whom; a blank node's status (incarnation 1); and nothing but that.
greeting() { printf '%s' "$(name "$1")$(name "$2")\x00\x00\x00\x00\x01" && printf '\\x00%.0s' {1..17}; }
# message TEXT: a request whose body is what one node says to another. Verb, target, type and Via are empty.
message() { printf '%s' "\\x00\\x00\\x00\\x00\\x02\\x$(printf '%b' "$1" | wc -c | xargs printf %02x)$1"; }

test_messages() {
  local own=${address[n1]} before type='Content-Type: application/x-kv-store-stream'
  before=$(view_and_counts)
  check "messages: a greeting" 200 "$(ask_on_stream n1 "$(message "$(greeting a:1 "$own")")")"
  check "messages: one that is none" 400 "$(ask_on_stream n1 "$(message nonsense)")"
  check "messages: one for a node by another name" 400 "$(ask_on_stream n1 "$(message "$(greeting a:1 a:2)")")"
  check "messages: one from nowhere" 400 "$(ask_on_stream n1 "$(message "$(greeting nowhere "$own")")")"
  check "messages: to an instance that is no node" 400 "$(ask_on_stream main "$(message "$(greeting a:1 "$own")")")"
  check "streams: a request that is none" "no answer" "$(ask_on_stream n1 'nonsense')"
  check "streams: one without a number" 405 "$(status_of n1 POST /kv-store -H "$type" -d '')"
  check "messages: nothing has changed" "$before" "$(view_and_counts)"
}

# answers_head INSTANCE: with what status it answers to who opens a stream, and how it proves then that it knows the secret.
answers_head() {
  curl -s -m 1 -o /dev/null -D - -H 'Content-Type: application/x-kv-store-stream' "${@:2}" "${url[$1]}/kv-store?stream=7" |
    tr -d '\r' | grep -i -E '^(HTTP|Authentication-Info)'
}

test_secret() {
  local node greeting
  for node in s1 s2 s3 s4; do "address_$mode" "$node"; done
  start_node s1 VIEW="$(view s1 s2)" SECRET=open-sesame && start_node s2 VIEW="$(view s1 s2)" SECRET=open-sesame
  start_node s3 SECRET=open-barley && start_node s4 && start apart FORWARDING_ADDRESS="${address[s1]}"
  check "secret: who knows it is a node" "20 20" "$(write s1 k 20) $(found s2 k 20)"
  check "secret: a follower does not need it" "20 20" "$(write apart l 20) $(found apart l 20)"
  expect "secret: who has another does not join" "$(json_error 503 "Node ${address[s3]} is down" PUT)" s1 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view s1 s2 s3)\"}"
  check "secret: who has none does not take part in a change" 503 "$(change_to s4 s1 s2 s4 | grep -o '...$')"
  greeting=$(message "$(greeting a:1 "${address[s1]}")")
  check "secret: a message without" 403 "$(ask_on_stream s1 "$greeting")"
  check "secret: a stream with what proves nothing" "HTTP/1.1 403 Forbidden" "$(answers_head s1 -H 'Authorization: Bearer open-sesame')"
  check "secret: nothing is proven to who proves nothing" "HTTP/1.1 200 OK" "$(answers_head s1)"
  check "secret: the view has not changed" "$(view s1 s2)" "$(view_of s1)"
  check "secret: it is not printed" "" "$(for node in s1 s2 s3 s4; do "log_$mode" "$node"; done | grep -E 'open-|sesame|barley')"
}

# Writers put, replace and delete through all nodes while nodes join and leave.
test_writers_during_changes() {
  local n round bad=0 reader
  write n1 r 100 >/dev/null
  for n in 1 2 3 4; do
    write_through "$n" >"$work/writers.$n" &
    clients[n]=$!
  done
  read_until "$work/written" >"$work/read" &
  reader=$!
  for round in 'n1 n2 n3 n4' 'n2 n4' 'n1 n2 n3' 'n3' 'n4 n3 n2 n1' 'n1 n2 n3'; do
    # shellcheck disable=SC2086 # a round is a list of nodes
    [[ $(change_to "n$((RANDOM % 4 + 1))" $round) == *200 ]] || bad=$((bad + 1))
    sleep 0.1
  done
  wait "${clients[@]}"
  touch "$work/written" && wait "$reader"
  check "writers: every view change is done" 0 "$bad"
  check "readers: no request failed meanwhile, none took a second" "0 0" "$(awk '$1 != 200 { bad++ } $2 > 1 { slow++ } END { print bad + 0, slow + 0 }' "$work/read")"
  check_that "readers: (there were some)" "$(wc -l <"$work/read") > 100"
  check "readers: (their keys go)" 100 "$(curl -s -X DELETE "${url[n1]}/kv-store/keys/r[1-100]" | grep -c Deleted)"
  check "writers: no request failed" "40 40 20" "$(paste -sd' ' "$work/writers.1")"
  check "writers: ... of the others neither" "$(cat "$work/writers.1")" "$(cat "$work/writers.2")"
  check "writers: what was acknowledged is there" "20 20 20 20" "$(found n1 w1_ 40) $(found n1 w2_ 40) $(found n1 w3_ 40) $(found n1 w4_ 40)"
  check "writers: each key is on one node" "$((before_writers + 80))" "$(total n1 n2 n3 n4)"
}
# read_until FILE: reads 100 keys through all nodes, again and again until there is a file; prints status and time of each answer.
read_until() {
  local round
  for round in {1..1000}; do
    curl -s -m 40 -w '%{http_code} %{time_total}\n' -o /dev/null "${url[n$((round % 4 + 1))]}/kv-store/keys/r[1-100]"
    [ ! -e "$1" ] || break
  done
}
write_through() { # NUMBER: puts 40 keys, replaces them, deletes the first 20
  write "n$1" "w$1_" 40
  write "n$(($1 % 4 + 1))" "w$1_" 40
  curl -s -m 40 -X DELETE "${url[n$((5 - $1))]}/kv-store/keys/w${1}_[1-20]" | grep -c Deleted
}

# tail_of INSTANCE: what an instance says of itself, from who is silent on.
tail_of() { ask "$1" GET /kv-store | grep -o '"silent".*'; }

test_node_paused_and_killed() {
  local all began keys
  all=$(total n1 n2 n3)
  mapfile -t keys < <(keys_of n1 n3)
  check "paused: (keys that n1 has)" "$(count n1)" "${#keys[@]}"
  local lost
  lost=$(keys_of n2 n1 | head -n 1)
  "pause_$mode" n2
  expect "paused: its own keys are not to be had" "503 {\"error\":\"Node ${address[n2]} is down\",\"message\":\"Error in GET\",\"address\":\"${address[n2]}\"}" n1 GET "/kv-store/keys/$lost"
  expect "paused: ... in the form vocabulary" "$(form_error 501 'Server unavailable')" n3 DELETE "/kv-store/$lost"
  await "paused: another says who is silent" "\"silent\":[\"${address[n2]}\"]}" tail_of n1
  check "paused: ... and counts it" 1 "$(metric n1 silent_nodes)"
  began=$(now)
  check "paused: a view change is refused" "{\"error\":\"Node ${address[n2]} is down\",\"message\":\"Error in PUT\"} 503" "$(change_to n1 n1 n2 n3 n4)"
  check_that "paused: ... soon (ms)" "$(now) - $began < 5000"
  check "paused: the others keep the view" "$(view n1 n2 n3) $(view n1 n2 n3)" "$(view_of n1) $(view_of n3)"
  check "paused: their keys are found" "${#keys[@]}" "$(found_of n1 n3 "${keys[@]}")"
  "resume_$mode" n2
  await "resumed: no key moved" "$all" total n1 n2 n3
  check "resumed: a view change works" 200 "$(change_to n1 n1 n2 n3 n4 | grep -o '...$')"

  local n
  for n in 1 2 3; do
    began=$(now)
    change_to n1 n1 n2 n3 >"$work/killed" &
    clients=($!)
    sleep "0.00$n"
    "kill_$mode" n4
    wait "${clients[@]}"
    await "killed in a view change: the living nodes agree on a view" agreed agreement n1 n2 n3
    check_that "killed in a view change: ... soon (ms)" "$(now) - $began < 10000"
    # What had been copied from the dead node, but not yet dropped there, is not handed over: it is to be had only after it was given up.
    keys_of_all >"$work/before"
    check "force: it is given up" 200 "$(change n1 "{\"view\":\"$(view n1 n2 n3)\",\"force\":true}" | grep -o '...$')"
    check "force: the rest are balanced" balanced "$(balanced "$(counts n1 n2 n3)")"
    keys_of_all >"$work/after"
    check "killed in a view change: every key that a living node has is found" "$(total n1 n2 n3)" "$(wc -l <"$work/after")"
    check "killed in a view change: ... and none is lost that was found before" "" "$(comm -23 "$work/before" "$work/after")"
    restart n4
    await "restarted: it is on its own" "$(view n4)" view_of n4
    check "restarted: it joins again" 200 "$(change_to n1 n1 n2 n3 n4 | grep -o '...$')"
    check "restarted: ... balanced" balanced "$(balanced "$(counts n1 n2 n3 n4)")"
  done
}
# keys_of NODE ASKED: asks one node for all keys that there may be; prints those that another one answers for. Many at a time:
# each question about a key of a node that is gone takes as long as a connection may.
keys_of() {
  local answers="$work/answers_of_$1"
  rm -rf "$answers"
  curl -sZ -m 40 --parallel-max 50 --create-dirs "${url[$2]}/kv-store/keys/e[1-300]" -o "$answers/e#1" \
    "${url[$2]}/kv-store/keys/w[1-4]_[1-40]" -o "$answers/w#1_#2"
  grep -rl "\"doesExist\":true.*\"address\":\"${address[$1]}\"" "$answers" | sed 's/.*\///'
}
# All keys that the first three nodes answer for, sorted.
keys_of_all() {
  { keys_of n1 n2 && keys_of n2 n3 && keys_of n3 n1; } | sort
}
# found_of NODE ASKED KEY...: how many of these keys a node answers for, asked through another one.
found_of() {
  local key
  for key in "${@:3}"; do printf 'url = "%s/kv-store/keys/%s"\n' "${url[$2]}" "$key"; done |
    curl -s -m 40 -K - | grep '"doesExist":true' | grep -c "\"address\":\"${address[$1]}\""
}

test_stale_nodes() {
  local all
  change_to n1 n1 n2 n3 >/dev/null
  all=$(total n1 n2 n3)
  "kill_$mode" n3
  check "stale: without force a dead node holds up a view change" 503 "$(change_to n1 n1 n2 | grep -o '...$')"
  check "stale: with force it is given up" 200 "$(change n1 "{\"view\":\"$(view n1 n2)\",\"force\":true}" | grep -o '...$')"
  settings[n3]="ADDRESS=${address[n3]} VIEW=$(view n1 n2 n3)"
  restart n3
  check "stale: a node with an old view relays by the new one" "201 0" "$(status_of n3 PUT /kv-store/keys/stale "${json[@]}" -d '{"value":1}') $(count n3)"
  check "stale: ... and says so" "$(view n1 n2)" "$(view_of n3)"
  change_to n1 n1 n2 n3 >/dev/null
  "pause_$mode" n3
  check "asleep: it is given up" 200 "$(change n1 "{\"view\":\"$(view n1 n2)\",\"force\":true}" | grep -o '...$')"
  status_of n1 PUT /kv-store/keys/stale "${json[@]}" -d '{"value":2}' >/dev/null
  "resume_$mode" n3
  check "awake: every answer is the others'" "\"value\":2" "$(ask n3 GET /kv-store/keys/stale | grep -o '"value":2')"
  await "awake: it holds no keys" 0 count n3
}

# Nodes that start again know nothing, and must not go by what they are started with while others know better.
test_nodes_that_start_again() {
  local all n
  change_to n1 n1 n2 n3 >/dev/null
  all=$(keys_of n3 n1 | wc -l)
  "kill_$mode" n1 && "kill_$mode" n2
  settings[n1]="ADDRESS=${address[n1]} VIEW=$(view n1 n2)" settings[n2]=${settings[n1]/${address[n1]}/${address[n2]}}
  restart n1 && restart n2
  await "start again: all nodes of the first view take up the present one" "$(view n1 n2 n3) $(view n1 n2 n3)" views n1 n2
  check "start again: ... and what the third one has is still there" "$all" "$(keys_of n3 n1 | wc -l)"
  check "start again: 60 new keys through one of them" 60 "$(write n2 e 60)"
  check "start again: ... are found through the others" "60 60" "$(found n1 e 60) $(found n3 e 60)"
  "kill_$mode" n2
  settings[n2]="ADDRESS=${address[n2]}"
  restart n2
  await "start again: a node without a VIEW takes up the present one" "$(view n1 n2 n3)" view_of n2
  check "start again: ... and answers for its keys" 60 "$(write n2 e 60)"
  for n in 1 2 3; do
    (sleep "0.0$n" && "pause_$mode" n2 && sleep 0.3 && "resume_$mode" n2) &
    clients=($!)
    check "paused in a view change: it is done all the same, or refused" "200" "$(change_to n1 n1 n2 n3 n4 | grep -o '...$' | sed 's/503/200/')"
    wait "${clients[@]}"
    await "paused in a view change: all agree" agreed agreement n1 n2 n3
    await "paused in a view change: no key is lost" 60 found n3 e 60
    await "paused in a view change: (back)" "200" back_to_three
  done
}
views() {
  local node list=()
  for node in "$@"; do list+=("$(view_of "$node")"); done
  echo "${list[*]}"
}
back_to_three() { change_to n3 n1 n2 n3 | grep -o '...$'; }

test_rival_changes() {
  local n answer nodes
  write n1 e 60 >/dev/null
  for n in {1..8}; do
    if ((n % 2)); then nodes=(n1 n2 n3 n4); else nodes=(n3 n2 n1); fi
    change_to "n$((n % 3 + 1))" "${nodes[@]}" >"$work/rival.$n" &
    clients[n]=$!
  done
  wait "${clients[@]}"
  answer=$(grep -h -o '...$' "$work"/rival.* | sort -u | paste -sd' ')
  check "rivals: each is done or told that another is in progress" "200" "${answer% 409}"
  await "rivals: all agree in the end" agreed agreement n1 n2 n3 n4
  check "rivals: no key is lost" "60 60" "$(found n1 e 60) $(found n4 e 60)"
}

# Whoever names dead nodes gets an error, however many, and the node goes on.
test_dead_addresses() {
  local n dead
  dead=$(printf ',127.0.0.1:%d' {1..999})
  for n in {1..50}; do
    change n1 "{\"view\":\"$(view n1)$dead\"}" >"$work/dead.$n" &
    clients[n]=$!
  done
  wait "${clients[@]}"
  check "1,000 dead addresses, 50 times at once: errors" 50 "$(grep -l -E ' (503|409)$' "$work"/dead.* | wc -l)"
  check "1,000 dead addresses: the node goes on" 60 "$(found n1 e 60)"
  check_that "1,000 dead addresses: its threads are bounded" "$(status_field n1 Threads) < 100"
}

test_first_views_that_differ() {
  local node
  for node in u1 u2 u3; do "address_$mode" "$node"; done
  start_node u3 VIEW="$(view u1 u2 u3)" && start_node u1 VIEW="$(view u1 u2)" && start_node u2 VIEW="$(view u1 u2)"
  check "first views: the node that the others do not list relays" "60 60 0" "$(write u3 g 60) $(found u1 g 60) $(count u3)"
  check "first views: the others share the keys" 60 "$(total u1 u2)"
}

test_blank_node_joins_one() {
  local node
  for node in one blank lonely absent; do "address_$mode" "$node"; done
  start_node lonely VIEW="$(view lonely absent)" && start_node one && start_node blank
  check "blank: a node that cannot answer for keys is not healthy" 1 "$("health_$mode" lonely)"
  await "blank: (a store of one has a key)" 201 status_of one PUT /kv-store/key -d val=1
  check "blank: a node without keys may be asked to join it" "1" "$(change_to blank blank one | grep -o '"moved":.*' | grep -c ' 200')"
  check "blank: ... and the key is found through it" 200 "$(status_of blank GET /kv-store/key)"
}

test_force_by_a_blank_node() {
  local kept
  kept=$(count u1)
  "address_$mode" u4 && start_node u4
  "kill_$mode" u2
  check "force, asked of the node that joins: done at once" 200 "$(change u4 "{\"view\":\"$(view u1 u4)\",\"force\":true}" | grep -o '...$')"
  check "... what a living node had is there" "$kept" "$(total u1 u4)"
}

# ---- Settings --------------------------------------------------------------------------------------------------------

# refused WHAT STATUS SETTING: the program ends with the status and one line that has the setting in it.
refused() {
  local output
  output=$("run_$mode" "${@:3}")
  check "settings: $1" "status $2, 1 line, named" \
    "$(tail -n 1 <<<"$output"), $(($(wc -l <<<"$output") - 1)) line, $([[ $output == *"${3#-- }"* ]] && echo named || echo "not named: $output")"
}

test_settings() {
  refused "a port that is none" 2 PORT=abc
  refused "a port out of range" 2 PORT=65536
  refused "port 0" 2 PORT=0
  refused "an IP that is none" 2 IP=localhost
  refused "a main instance without a port" 2 FORWARDING_ADDRESS=nohost
  refused "a main instance that is a URL" 2 FORWARDING_ADDRESS=http://main:8080
  refused "a main instance with a port that is none" 2 MAINIP=main:http
  refused "an address that is none" 2 ADDRESS=:8080
  refused "a view without an address" 2 VIEW=a:1,b:1
  refused "a view beside a main instance" 2 VIEW=a:1 ADDRESS=a:1 FORWARDING_ADDRESS=b:1
  refused "a factor beside a main instance" 2 REPL_FACTOR=1 ADDRESS=a:1 FORWARDING_ADDRESS=b:1
  refused "a view with an address that is none" 2 VIEW=a:1,b ADDRESS=a:1
  refused "a view that names a node twice" 2 VIEW=a:1,A:1 ADDRESS=a:1
  refused "an address that this machine does not have" 1 IP=192.0.2.1
  check "settings: a secret without an address, not shown" "status 2, 1 line" "$("run_$mode" SECRET=sesame | grep -v sesame | awk '/SECRET=/ { n++ } END { print $0 ", " n " line" }')"
  check "settings: a secret with a space" "status 2, 1 line" "$("run_$mode" ADDRESS=a:1 "SECRET=open sesame" | grep -v sesame | awk '/SECRET=/ { n++ } END { print $0 ", " n " line" }')"
  check "settings: an argument that is none" "status 2" "$("run_$mode" -- --nonsense | tail -n 1)"
  check "--version" "kv-store 2.0.0 status 0" "$("run_$mode" -- --version | xargs)"
  check "--help names the settings" "status 0 7" "$("run_$mode" -- --help | awk '/^  (PORT|IP|FORWARDING_ADDRESS|MAINIP|ADDRESS|VIEW|SECRET) / { n++ } /^status/ { s = $0 } END { print s, n }')"
}

test_few_files_local() {
  check "settings: too few files for 100 connections" "status 1, named" "$( (ulimit -n 499 && run_local) | awk '/ulimit -n 499: expected 500 or more/ { n = "named" } /^status/ { s = $0 } END { print s ", " n }')"
}
test_port_in_use_local() {
  check "settings: a port in use" "status 1, named" "$(run_local IP=127.0.0.1 PORT="${address[main]##*:}" | awk '/PORT=/ { n = "named" } /^status/ { s = $0 } END { print s ", " n }')"
}

test_image_docker() {
  check_that "the image is under 3 MB (bytes)" "$(docker image inspect -f '{{.Size}}' kv-store:test) < 3000000"
  check "the image's health check passes" 0 "$(health_docker main)"
  check "the image says which port it serves" 'map[8080/tcp:{}]' "$(docker image inspect -f '{{.Config.ExposedPorts}}' kv-store:test)"
  local began
  began=$(now)
  stop_docker second
  check "docker stop ends a container with status 0" 0 "$ended"
  check_that "... at once and not after ten seconds (ms)" "$(now) - $began < 5000"
}

# ---- Several replicas ------------------------------------------------------------------------------------------------

# replicated FACTOR NODE...: starts a store of these nodes, and waits until each answers.
replicated() {
  local node
  for node in "${@:2}"; do "address_$mode" "$node"; done
  for node in "${@:2}"; do start_node "$node" VIEW="$(view "${@:2}")" REPL_FACTOR="$1"; done
  for node in "${@:2}"; do await "factor $1: $node answers" 404 status_of "$node" GET /kv-store/keys/none; done
  for node in "${@:2}"; do await "factor $1: $node has what the others have" yes caught_up "$node"; done
}
# members ID NODE: the replicas of a shard, and how many keys it has, as a node tells them.
members() { ask "$2" GET "/kv-store/shards/$1" | sed -E 's/.*"key-count":([0-9]+),"replicas":\[(.*)\].*/\1 \2/' | tr -d '"'; }
# caught_up NODE: "yes" when its log says that it has everything, since its last start.
caught_up() { "log_$mode" "$1" | awk '/listening on/ { has = "no" } /has everything/ { has = "yes" } END { print has }'; }
# value NODE KEY [CONTEXT]: the value of a key, or the error.
value() { ask "$1" GET "/kv-store/keys/$2" "${json[@]}" -d "{${3:-}}" | sed -nE 's/.*"(value|error)":("[^"]*"|[0-9]+).*/\2/p' | tr -d '"'; }
# write_with NODE KEY VALUE [CONTEXT]: writes; prints the context that it got, to be handed on.
readonly no_context='"causal-context":{}'
write_with() { ask "$1" PUT "/kv-store/keys/$2" "${json[@]}" -d "{\"value\":\"$3\",${4:-$no_context}}" | grep -o '"causal-context":{[^}]*}'; }

test_empty_store() {
  local node
  for node in e1 e2; do "address_$mode" "$node"; done
  start_node e1 VIEW="$(view e1 e2)" && start_node e2 VIEW="$(view e1 e2)"
  check "empty store: shrinks to one node" 0 "$(shards "$(change_to e1 e1)")"
  check "empty store: ... and grows again" "0 0" "$(shards "$(change_to e1 e1 e2)")"
}

test_shards_of_several() {
  local answer node
  replicated 2 r1 r2 r3 r4
  check "shards of two: dealt out in the order of the view" "0 $(view r1 r2) 0 $(view r3 r4)" "$(members 1 r4) $(members 2 r1)"
  check "shards of two: 60 keys through r1, 60 through r4" "60 60" "$(write r1 a 60) $(write r4 b 60)"
  check "shards of two: every key through every node" "120 120 120 120" "$(for node in r1 r2 r3 r4; do echo $(($(found "$node" a 60) + $(found "$node" b 60))); done | paste -sd' ')"
  check "shards of two: replicas have the same count" "$(count r1) $(count r3)" "$(count r2) $(count r4)"
  check "shards of two: ... and together all keys" 120 "$(total r1 r3)"
  check "shards of two: a node of the key's shard adds no address" "$(count r1)" "$(curl -s "${url[r2]}/kv-store/keys/[a-b][1-60]" | grep -vc address)"
  check "shards of two: another node adds that of a replica" "$(count r1)" "$(curl -s "${url[r3]}/kv-store/keys/[a-b][1-60]" | grep -cE "\"address\":\"(${address[r1]}|${address[r2]})\"")"
  answer=$(change_to r1 r1 r2 r3 r4)
  check "shards of two: a view change has no address, and balances" "balanced [\"${address[r1]}\",\"${address[r2]}\"]" \
    "$(balanced "$(shards "$answer")") $(grep -o '\[[^][]*\]' <<<"$answer" | head -n 1)$(grep -c address <<<"$answer" | grep -v 0)"
  for answer in 0 5 '"2"' 1.5 true; do
    expect "factor $answer is refused" "400 {\"error\":\"View is not valid: repl-factor is ${answer//\"/\'}, not a whole number from 1 to 4, the number of nodes\",\"message\":\"Error in PUT\"}" \
      r1 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view r1 r2 r3 r4)\",\"repl-factor\":$answer}"
  done
  check "a key is deleted" "201 200" "$(status_of r1 PUT /kv-store/keys/z "${json[@]}" -d '{"value":1}') $(status_of r4 DELETE /kv-store/keys/z)"
  check "factor 1: four shards" "30 30 30 30" "$(shards "$(change r2 "{\"view\":\"$(view r1 r2 r3 r4)\",\"repl-factor\":1}")")"
  check "factor 1: what was deleted is not there" "404 404 201 200" "$(for verb in GET DELETE PUT DELETE; do status_of r3 "$verb" /kv-store/keys/z "${json[@]}" -d '{"value":1}'; done | paste -sd' ')"
  check "factor 1: ... and it stays" "40 40 40" "$(shards "$(change_to r3 r1 r2 r3)")"
  check "factor 3: one shard" 120 "$(shards "$(change r2 "{\"view\":\"$(view r1 r2 r3 r4)\",\"repl-factor\":3}")")"
  check "factor 3: every node has every key" "120 120 120 120" "$(counts r1 r2 r3 r4)"
  check "factor 2: two shards again" "60 60" "$(shards "$(change r4 "{\"view\":\"$(view r1 r2 r3 r4)\",\"repl-factor\":2}")")"
  check "factor 2: nothing is lost" "60 60" "$(found r1 a 60) $(found r4 b 60)"
  check "three nodes are one shard: the keys of the other move" 60 "$(moved "$(change_to r1 r1 r2 r3)")"
  check "... and r4 has left" "0 120" "$(count r4) $(count r3)"
  check "... and comes back" "60 60" "$(shards "$(change_to r1 r1 r2 r3 r4)")"
  check "one node is one shard" 120 "$(shards "$(change_to r1 r1)")"
  check "... and the factor is still 2 when it grows" "60 60" "$(shards "$(change_to r1 r1 r2 r3 r4)")"
}

test_replicas_killed() {
  local round reader
  check "killed: 100 keys" 100 "$(write r1 k 100)"
  for round in 1 2; do
    "kill_$mode" r2
    check "killed: reads go on, round $round" "100 100 100" "$(found r1 k 100) $(found r3 k 100) $(found r4 k 100)"
    check "killed: writes go on" "100 100" "$(write r1 k 100) $(write r4 l 100)"
    check "killed: a view change that keeps the dead node is refused" 503 "$(change_to r1 r1 r2 r3 r4 | grep -o '...$')"
    restart r2
    await "restarted blank: r2 catches up" yes caught_up r2
    "kill_$mode" r1
    check "killed: what r1 had, r2 has" "100 100" "$(found r2 k 100) $(found r3 l 100)"
    restart r1
    await "restarted blank: r1 catches up" yes caught_up r1
  done
  # Writers and a reader go on while replicas are killed and started again.
  rm -f "$work/written"
  write_all_along r3 >"$work/writers" &
  reader=$!
  for round in r1 r4 r2 r1 r4 r2; do
    "kill_$mode" "$round"
    restart "$round"
    await "under load: $round catches up" yes caught_up "$round"
  done
  touch "$work/written" && wait "$reader"
  check "under load: every acknowledged write is there, through every node" "$(sort -u "$work/writers" | wc -l)" "$(last_values "$work/writers" r1 r2 r4)"
  check_that "under load: (there were some)" "$(wc -l <"$work/writers") > 10"
  "kill_$mode" r4
  check "a dead replica leaves without force" 200 "$(change_to r1 r1 r2 r3 | grep -o '...$')"
  check "... nothing is lost" "100 100" "$(found r1 k 100) $(found r3 l 100)"
  settings[r4]="ADDRESS=${address[r4]}"
  restart r4
  await "... and it joins again, blank" 200 status_of_change r1 r1 r2 r3 r4
  check "... nothing is lost then" "100 100" "$(found r4 k 100) $(found r4 l 100)"
}
status_of_change() { change_to "$@" | grep -o '...$'; }
# write_all_along NODE: writes until there is a file; prints the keys whose write was acknowledged.
write_all_along() {
  local n
  for n in {1..2000}; do
    [ ! -e "$work/written" ] || break
    [[ $(status_of "$1" PUT "/kv-store/keys/m$n" "${json[@]}" -d '{"value":"of m"}') != 20? ]] || echo "m$n"
  done
}
# last_values FILE NODE...: how many of these keys each of the nodes finds; one number if they are the same.
last_values() {
  local node
  for node in "${@:2}"; do sed "s|.*|url = \"${url[$node]}/kv-store/keys/&\"|" "$1" | curl -s -m 40 -K - | grep -c '"of m"'; done | sort -u | paste -sd' '
}

test_replica_paused() {
  local began
  check "paused replica: 50 keys" 50 "$(write r1 p 50)"
  "pause_$mode" r2
  began=$(now)
  check "paused replica: a write waits for it once" 201 "$(status_of r1 PUT /kv-store/keys/slow "${json[@]}" -d '{"value":1}')"
  check "paused replica: ... and then nobody does" 50 "$(write r1 p 50)"
  check "paused replica: deletions too" 20 "$(curl -s -X DELETE "${url[r1]}/kv-store/keys/p[1-20]" | grep -c Deleted)"
  check_that "paused replica: (ms)" "$(now) - $began < 8000"
  check "paused replica: reads through every other node" "30 30 30" "$(found r1 p 50) $(found r3 p 50) $(found r4 p 50)"
  "resume_$mode" r2
  await "resumed: it has what it missed" "30 $(count r1)" found_and_count r2
  check "resumed: what was deleted stays deleted" 30 "$(found r1 p 50)"
}
found_and_count() { echo "$(found "$1" p 50) $(count "$1")"; }

test_causal_contexts() {
  local body
  expect "context: {} in a healthy store" '201 {"message":"Added successfully","replaced":false,"causal-context":{}}' main PUT /kv-store/keys/causal "${json[@]}" -d '{"value":1,"causal-context":{}}'
  for node in main follower; do
    expect "context, $node: a read has it" '200 {"doesExist":true,"message":"Retrieved successfully","value":1,"causal-context":{}}' "$node" GET /kv-store/keys/causal "${json[@]}" -d '{"causal-context":{}}'
    expect "context, $node: without one there is none" '200 {"doesExist":true,"message":"Retrieved successfully","value":1}' "$node" GET /kv-store/keys/causal
    expect "context, $node: an error has it" '404 {"doesExist":false,"error":"Key does not exist","message":"Error in DELETE","causal-context":{}}' "$node" DELETE /kv-store/keys/none "${json[@]}" -d '{"causal-context":{}}'
    for body in '[]' 1 '"x"' null '{"a":1}' '{"a":"xyz"}' '{"a":"ffffffffffffffff"}' '{"a":{}}'; do
      expect "context, $node: $body is none of ours" "$(json_error 400 'Causal context is not valid' GET)" "$node" GET /kv-store/keys/causal "${json[@]}" -d "{\"causal-context\":$body}"
    done
  done
  expect "context: deleted" '200 {"doesExist":true,"message":"Deleted successfully","causal-context":{}}' main DELETE /kv-store/keys/causal "${json[@]}" -d '{"causal-context":{}}'
}

# One replica of three is cut off from the others, and clients reach all of them.
test_cut_network_docker() {
  local context began node
  replicated 3 c1 c2 c3
  check "cut: 30 keys" 30 "$(write c1 q 30)"
  # Soon after the start: when all have found out that they have the same.
  write_with c2 x old >/dev/null
  await "cut: one more" '"causal-context":{}' context_after_read c2 x "$no_context"
  cut_docker c3
  context=$(write_with c1 x new)
  check_that "cut: what c3 may lack is in the context" "${#context} > 25"
  check "cut: the other side goes on with what it has" old "$(value c3 x)"
  check "cut: a session that has seen more is told so" "Unable to satisfy request" "$(value c3 x "$context")"
  began=$(now)
  check "cut: ... again" "Unable to satisfy request" "$(value c3 x "$context")"
  check_that "cut: ... within a second (ms)" "$(now) - $began < 1300"
  check "cut: it reads what is on its own side" new "$(value c2 x "$context")"
  check "cut: ... of any key that may depend on it" "Unable to satisfy request" "$(value c3 q1 "$context")"
  check "cut: a key that is newer than all that the context speaks of is answered" "fresh" "$(write_with c3 w fresh >/dev/null && value c3 w "$context")"
  context=$(write_with c3 x "newer" "$context")
  check "cut: a write is never refused, and comes after what it knew of" newer "$(value c3 x "$context")"
  check "cut: deletions on one side" 10 "$(curl -s -X DELETE "${url[c2]}/kv-store/keys/q[1-10]" | grep -c Deleted)"
  check "cut: ... are not known on the other" 30 "$(found c3 q 30)"
  check "cut: new keys on both sides" "20 20" "$(write c1 s 20) $(write c3 t 20)"
  check "cut: a view change is refused" 503 "$(status_of c3 PUT /kv-store/view-change "${json[@]}" -d "{\"view\":\"$(view c2 c3)\"}")"
  heal_docker c3
  for node in c1 c2 c3; do
    await "healed: $node has what both sides wrote" "20 20" both_sides "$node"
    await "healed: $node has the later value" newer value "$node" x
    await "healed: what was deleted stays deleted, at $node" 20 found "$node" q 30
  done
  await "healed: no context is needed any more" '"causal-context":{}' context_after_read c2 x "$context"
}
both_sides() { echo "$(found "$1" s 20) $(found "$1" t 20)"; }
context_after_read() { ask "$1" GET "/kv-store/keys/$2" "${json[@]}" -d "{$3}" | grep -o '"causal-context":{[^}]*}'; }

# ---- The bench -------------------------------------------------------------------------------------------------------
#
# Everything runs side by side on this machine, and each round asks all competitors one after the other, so that whatever
# else the machine does hits all of them alike. A cell of the table is the median of its rounds, a ratio the median of the
# rounds' ratios. Bench instances are processes: CPU time and memory are what the kernel says of them.

readonly ROUNDS=3
readonly PIPELINED=16 # requests in one write, where they are pipelined
readonly IDLE_NODES=10
readonly VIEW_KEYS=300000 MEMORY_KEYS=1000000 MEMORY_CLIENTS=1000
declare -A workers=() # instance -> the processes that its clients talk to

# need_wrk: there is no bench without it.
need_wrk() {
  command -v wrk >/dev/null && return
  echo "test.sh: the bench needs wrk: apt-get install wrk" >&2
  exit 2
}

# wrong WHAT: says why there is no number, or no bench at all. Always fails.
wrong() { echo "test.sh: $1" >&2 && return 1; }

# write_wrk_script: what wrk sends, from the environment: VERB, and DEPTH requests in one write; or KEYS different keys, again
# and again. Its last line is "counted REQUESTS MICROSECONDS NOT-2XX SOCKET-ERRORS P99", the last in microseconds.
write_wrk_script() {
  cat >"$work/wrk.lua" <<'END'
local depth, keys = tonumber(os.getenv("DEPTH")), tonumber(os.getenv("KEYS"))
wrk.method = os.getenv("VERB")
if wrk.method == "PUT" then
  wrk.headers["Content-Type"] = "application/x-www-form-urlencoded"
  wrk.body = "val=abcdef"
end
if keys then
  local put = "PUT /kv-store/%010d HTTP/1.1\r\nHost: bench\r\nContent-Type: application/x-www-form-urlencoded\r\n" ..
    "Content-Length: 14\r\n\r\nval=%010d"
  local key, batch = 0, {}
  function request()
    for n = 1, depth do
      batch[n] = put:format(key, key)
      key = (key + 1) % keys
    end
    return table.concat(batch)
  end
elseif depth > 1 then
  local batch
  function init() batch = wrk.format():rep(depth) end
  function request() return batch end
end
function done(summary, latency)
  local e = summary.errors
  print(("counted %d %d %d %d %d"):format(summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(99)))
end
END
}

# start_nginx: the two servers that kv-store is compared with. No request is written to a file, and no connection is
# closed for having served many requests, which kv-store does not do either.
start_nginx() {
  local server main=${address[main]}
  for server in return_200 keepalive; do
    address_local "$server"
    url[$server]=http://${address[$server]}
  done
  cat >"$work/nginx.conf" <<END
daemon off;
user $(id -un) $(id -gn);
worker_processes 2;
pid $work/nginx.pid;
error_log $work/nginx.log notice;
events { worker_connections 2048; }
http {
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path $work/nginx.1;
  proxy_temp_path $work/nginx.2;
  fastcgi_temp_path $work/nginx.3;
  uwsgi_temp_path $work/nginx.4;
  scgi_temp_path $work/nginx.5;
  upstream main { server $main; keepalive 256; keepalive_requests 1000000000; }
  server {
    listen ${address[return_200]};
    default_type application/json;
    return 200 '{"result":"Success","value":"abcdef"}\n';
  }
  server {
    listen ${address[keepalive]};
    location / { proxy_pass http://main; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
END
  "$nginx" -p "$work" -c "$work/nginx.conf" 2>"$work/nginx.stderr" &
  for server in return_200 keepalive; do
    await_answer "$server" || {
      cat "$work/nginx.stderr" >&2
      return 1
    }
  done
  local started=()
  until [ "${#started[@]}" -ge 2 ]; do
    mapfile -t started < <(sed -n 's/.*start worker process \([0-9]*\)$/\1/p' "$work/nginx.log")
  done
  for server in return_200 keepalive; do workers[$server]=${started[*]}; done
}

# start_benched: whatever the table's rows ask, and $key, which the first node has to fetch from the second.
start_benched() {
  local instance n=0
  start main && start follower FORWARDING_ADDRESS="${address[main]}" || return 1
  for instance in n1 n2 n3 n4; do address_local "$instance"; done
  start_node n1 VIEW="$(view n1 n2)" && start_node n2 VIEW="$(view n1 n2)" || return 1
  if [ -n "$nginx" ]; then start_nginx || return 1; fi
  until key=bench$n && [[ $(ask n1 GET "/kv-store/keys/$key") == *"\"address\":\"${address[n2]}\""* ]]; do
    n=$((n + 1))
    [ "$n" -lt 100 ] || wrong "n1 does not relay to n2" || return
  done
  ask main PUT "/kv-store/$key" -d val=abcdef >/dev/null
  ask n2 PUT "/kv-store/$key" -d val=abcdef >/dev/null
  for instance in main follower n1; do workers[$instance]=${process[$instance]}; done
  for instance in "${!workers[@]}"; do
    [ "$(status_of "$instance" PUT "/kv-store/$key" -d val=abcdef) $(ask "$instance" GET "/kv-store/$key")" = \
      '200 200 {"result":"Success","value":"abcdef"}' ] || wrong "$instance gives wrong answers" || return
  done
}

# ticks INSTANCE: the CPU time that its workers have had so far, in ticks of the kernel's clock.
ticks() {
  local worker stat sum=0
  for worker in ${workers[$1]}; do
    read -r stat <"/proc/$worker/stat"
    read -r -a stat <<<"${stat##*) }" # what follows the name, which may have spaces
    sum=$((sum + stat[11] + stat[12]))
  done
  echo "$sum"
}

# measure ROUND VERB CONNECTIONS DEPTH INSTANCE: has wrk ask for a second, and notes what came of it. One thread of wrk would
# be what limits direct requests; two are as many as nginx has workers.
measure() {
  local threads=$(($3 > 1 ? 2 : 1)) before counted
  before=$(ticks "$5")
  counted=$(VERB=$2 DEPTH=$4 wrk -t "$threads" -c "$3" -d 1s -s "$work/wrk.lua" "${url[$5]}/kv-store/$key" 2>&1 | sed -n 's/^counted //p')
  echo "$* $(($(ticks "$5") - before)) ${counted:-0 0 0 0 0}" >>"$work/cells"
}
measure_all() {
  local round verb connections instance
  for ((round = 1; round <= ROUNDS; round++)); do
    echo "test.sh: round $round of $ROUNDS" >&2
    for connections in 1 8 64 256; do
      for verb in GET PUT; do
        # Next to each other are those that are compared.
        for instance in main return_200 follower keepalive n1; do
          [ -z "${workers[$instance]:-}" ] || measure "$round" "$verb" "$connections" 1 "$instance"
        done
      done
    done
    for verb in GET PUT; do
      for instance in main return_200; do
        [ -z "${workers[$instance]:-}" ] || measure "$round" "$verb" 64 "$PIPELINED" "$instance"
      done
    done
  done
}

# fill KEYS INSTANCE: puts keys of 10 bytes with values of 10 bytes until the instance has so many, for 30 s at most.
fill() {
  local deadline=$(($(now) + 30000)) filler
  KEYS=$1 DEPTH=64 VERB=PUT wrk -t 1 -c 4 -d 31s -s "$work/wrk.lua" "${url[$2]}" >"$work/fill" 2>&1 &
  filler=$!
  until [ "$(count "$2")" = "$1" ] || [ "$(now)" -gt "$deadline" ]; do sleep 0.05; done
  kill -INT "$filler" 2>/dev/null # which ends wrk in order
  wait "$filler"
  [ "$(count "$2")" = "$1" ] || wrong "$2 has $(count "$2") keys of $1"
}

# measure_view_change: a fourth node joins three, ROUNDS times; $keys_a_second is the median, $longest_wait that of one client that
# reads meanwhile, through two nodes, in milliseconds.
measure_view_change() {
  local round answer reader
  keys_a_second=error longest_wait=error
  ask n1 DELETE "/kv-store/$key" >/dev/null
  start_node n3 && start_node n4 && change_to n1 n1 >/dev/null && fill "$VIEW_KEYS" n1 || return
  for ((round = 1; round <= ROUNDS; round++)); do
    change_to n1 n1 n2 n3 >/dev/null
    rm -f "$work/changed"
    read_until "$work/changed" >>"$work/waits" &
    reader=$!
    answer=$(curl -s -m 40 -X PUT -w ' %{http_code} %{time_total}' "${json[@]}" -d "{\"view\":\"$(view n1 n2 n3 n4)\"}" "${url[n1]}/kv-store/view-change" | tr -d '\n')
    touch "$work/changed" && wait "$reader"
    [[ $answer == *' 200 '* && $(moved "$answer") = $((VIEW_KEYS / 4)) && $(total n1 n2 n3 n4) = "$VIEW_KEYS" ]] ||
      wrong "the view change: $answer" || return
    awk -v moved="$(moved "$answer")" '{ printf "%.0f\n", moved / $NF }' <<<"$answer"
  done >"$work/changes"
  keys_a_second=$(sort -n "$work/changes" | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }')
  longest_wait=$(awk '$2 > most { most = $2 } END { printf "%.0f", most * 1000 }' "$work/waits")
}

# measure_idle_store: $idle_cpu is the share of one core that a store of IDLE_NODES takes in all when nobody asks it anything.
measure_idle_store() {
  local node nodes=() before
  idle_cpu=error
  for ((node = 1; node <= IDLE_NODES; node++)); do
    nodes+=("idle$node")
    address_local "idle$node"
  done
  for node in "${nodes[@]}"; do start_node "$node" VIEW="$(view "${nodes[@]}")" || return; done
  ask idle1 PUT /kv-store/key -d val=1 >/dev/null # which waits until all nodes have found one another
  workers[idle]=
  for node in "${nodes[@]}"; do workers[idle]+="${process[$node]} "; done
  before=$(ticks idle)
  sleep 5 # is what is measured
  idle_cpu=$(awk -v ticks=$(($(ticks idle) - before)) -v hz="$(getconf CLK_TCK)" 'BEGIN { printf "%.1f", ticks / hz / 5 * 100 }')
}

# measure_key_memory: $key_bytes and $redis_bytes are what one of a million keys takes, key and value included.
measure_key_memory() {
  local before
  key_bytes=error redis_bytes=-
  start memory || return
  before=$(status_field memory VmRSS)
  if fill "$MEMORY_KEYS" memory; then key_bytes=$((($(status_field memory VmRSS) - before) * 1024 / MEMORY_KEYS)); fi
  kill_local memory
  [ -n "$redis" ] || return 0
  address_local redis
  local ask_redis=(redis-cli -h 127.0.0.1 -p "${address[redis]##*:}")
  "$redis" --bind 127.0.0.1 --port "${address[redis]##*:}" --save '' --appendonly no --dir "$work" >"$work/redis.log" &
  process[redis]=$! redis_bytes=error
  local try
  for try in {1..100}; do
    [ "$("${ask_redis[@]}" ping 2>/dev/null)" != PONG ] || break
    sleep 0.05
  done
  before=$(status_field redis VmRSS)
  awk -v keys="$MEMORY_KEYS" 'BEGIN { for (n = 0; n < keys; n++) printf "SET %010d %010d\r\n", n, n }' | "${ask_redis[@]}" --pipe >"$work/redis.fill" 2>&1
  [ "$("${ask_redis[@]}" dbsize)" = "$MEMORY_KEYS" ] || wrong "redis after $try tries: $(tail -n 1 "$work/redis.fill")" || return
  redis_bytes=$((($(status_field redis VmRSS) - before) * 1024 / MEMORY_KEYS))
}

# measure_replicas: $puts_1, $gets_1 and $puts_3, $gets_3 are requests/s of three nodes with one replica a shard, and with three;
# $puts_etcd is that of three nodes of etcd, with their data in memory; $caught_up the keys/s of a replica that starts again.
measure_replicas() {
  local factor node began
  puts_1=error gets_1=error puts_3=error gets_3=error puts_etcd=- caught_up=error
  cat >"$work/keys.lua" <<'END'
local key = 0
local headers = { ["Content-Type"] = "application/json" }
function request()
  key = (key + 1) % 5000
  if os.getenv("VERB") == "ETCD" then
    return wrk.format("POST", "/v3/kv/put", headers, ('{"key":"a2V5%04d","value":"YWJjZGVm"}'):format(key))
  end
  return wrk.format(os.getenv("VERB"), "/kv-store/keys/key" .. key, headers, '{"value":"abcdef"}')
end
END
  for node in f1 f2 f3; do address_local "$node"; done
  for factor in 1 3; do
    for node in f1 f2 f3; do start_node "$node" VIEW="$(view f1 f2 f3)" REPL_FACTOR="$factor" || return; done
    until [ "$(status_of f1 GET /kv-store/keys/none)" = 404 ]; do sleep 0.1; done
    read -r "puts_$factor" <<<"$(rate PUT "${url[f1]}")"
    read -r "gets_$factor" <<<"$(rate GET "${url[f1]}")"
    for node in f1 f2 f3; do kill_local "$node"; done
  done
  [ -z "$etcd" ] || measure_etcd
  for node in f1 f2 f3; do start_node "$node" || return; done
  fill "$MEMORY_KEYS" f1 && change f1 "{\"view\":\"$(view f1 f2 f3)\",\"repl-factor\":3}" >/dev/null || return
  kill_local f3
  began=$(now)
  restart f3
  until [ "$(count f3)" = "$MEMORY_KEYS" ] || (($(now) > began + 60000)); do sleep 0.05; done
  caught_up=$((MEMORY_KEYS * 1000 / ($(now) - began)))
}
rate() { VERB=$1 wrk -t2 -c64 -d3s -s "$work/keys.lua" "$2" | awk '/Non-2xx/ { bad = 1 } /^Requests.sec/ { rate = int($2) } END { print bad ? "error" : rate }'; }
measure_etcd() {
  local node cluster=() data=/dev/shm
  puts_etcd=error
  [ -d "$data" ] || data=$work
  data=$(mktemp -d "$data/kv-store-bench.XXXXXX")
  for node in etcd1 etcd2 etcd3; do
    address_local "$node" && address_local "$node.peer"
    cluster+=("$node=http://${address[$node.peer]}")
  done
  for node in etcd1 etcd2 etcd3; do
    "$etcd" --name "$node" --data-dir "$data/$node" --listen-client-urls "http://${address[$node]}" --advertise-client-urls "http://${address[$node]}" \
      --listen-peer-urls "http://${address[$node.peer]}" --initial-advertise-peer-urls "http://${address[$node.peer]}" \
      --initial-cluster "$(IFS=, && echo "${cluster[*]}")" >"$work/$node.log" 2>&1 &
    process[$node]=$!
  done
  local etcd_is_up=(curl -s -f -o /dev/null -d '{"key":"a2V5","value":"YWJj"}' "http://${address[etcd1]}/v3/kv/put")
  poll "${etcd_is_up[@]}" && puts_etcd=$(rate ETCD "http://${address[etcd1]}")
  for node in etcd1 etcd2 etcd3; do kill_local "$node"; done
  rm -rf "$data"
}
# over A B: how many times B fits into A.
over() { awk -v a="$1" -v b="$2" 'BEGIN { if (a + 0 && b + 0) printf "%.2f", a / b; else printf "?" }'; }

# connection_memory INSTANCE: opens connections; prints what each takes, in KiB: before its first request, and after it.
connection_memory() {
  local pid=${process[$1]} files fd n clients=() rss=()
  ulimit -S -n $((MEMORY_CLIENTS + 100)) 2>/dev/null
  files=$(find "/proc/$pid/fd" | wc -l)
  rss+=("$(status_field "$1" VmRSS)")
  for ((n = 0; n < MEMORY_CLIENTS; n++)); do
    connect "$1" || return
    clients+=("$fd")
  done
  # Whether all of them were accepted shows in the files that the instance has open.
  for ((n = 0; $(find "/proc/$pid/fd" | wc -l) < files + MEMORY_CLIENTS; n++)); do
    [ "$n" -lt 100 ] || return
    sleep 0.05
  done
  rss+=("$(status_field "$1" VmRSS)")
  for fd in "${clients[@]}"; do
    printf 'GET /kv-store HTTP/1.1\r\nHost: bench\r\n\r\n' >&"$fd"
    read -r -t 5 -d '}' _ <&"$fd" || return
  done
  rss+=("$(status_field "$1" VmRSS)")
  awk -v n="$MEMORY_CLIENTS" '{ printf "%.1f %.1f", ($2 - $1) / n, ($3 - $1) / n }' <<<"${rss[*]}"
}
measure_connection_memory() {
  local opened asked
  connection_kib=error
  start idle && read -r opened asked <<<"$(connection_memory idle 2>/dev/null)"
  [ -n "${asked:-}" ] || wrong "$MEMORY_CLIENTS connections were not served (ulimit -n: $(ulimit -H -n))" || return
  connection_kib="$opened KiB, $asked KiB once it has served a request"
}

# print_table: of the cells. Its status says whether all requests were answered.
print_table() {
  awk -v hz="$(getconf CLK_TCK)" -v rounds="$ROUNDS" -v depth="$PIPELINED" -v keys="$keys_a_second" -v view_keys="$VIEW_KEYS" '
    # ROUND VERB CONNECTIONS DEPTH INSTANCE TICKS REQUESTS MICROSECONDS NOT-2XX SOCKET-ERRORS P99
    {
      group = $2 " " $3 " " $4
      row = group " " $5
      if (!(group in seen)) groups[++count] = group
      seen[group]; seen[row]
      if ($7 == 0 || $9 + $10 > 0) {
        if (!(row in error)) error[row] = $7 == 0 ? "no answers" : "of " $7 " answers " $9 " not 2xx; " $10 " socket errors"
        next
      }
      rate[row, $1] = $7 / $8 * 1e6
      cpu[row, $1] = $6 / hz / $7 * 1e6
      p99[row, $1] = $11 / 1000
    }
    function median(values, row, peer,  n, m, t, sorted) { # of the rounds; of their ratios if there is a peer
      for (n = 1; n <= rounds; n++) {
        t = values[row, n]
        if (peer != "") t = values[peer, n] > 0 ? t / values[peer, n] : 0
        for (m = n - 1; m > 0 && sorted[m] > t; m--) sorted[m + 1] = sorted[m]
        sorted[m + 1] = t
      }
      return sorted[int((rounds + 1) / 2)]
    }
    function print_row(request, asked, connections, rate, cpu, p99, remark,  line) {
      line = sprintf("%-11s  %-23s  %11s  %10s  %6s  %7s  %s", request, asked, connections, rate, cpu, p99, remark)
      sub(/ +$/, "", line)
      print line
    }
    function compared(row, part,  peer, name) {
      if (part[4] in of_nginx) return ""
      peer = part[4] == "main" ? "return_200" : "keepalive"
      name = part[4] == "main" ? "return 200" : "keepalive"
      peer = part[1] " " part[2] " " part[3] " " peer
      if (!(peer in seen) || peer in error) return "-"
      return sprintf("%.2f x %s, %.2f x its CPU", median(rate, row, peer), name, median(cpu, row, peer))
    }
    END {
      title["main"] = "kv-store, owner"
      title["follower"] = "kv-store, follower"
      title["n1"] = "kv-store, not the owner"
      title["return_200"] = "nginx, return 200"
      title["keepalive"] = "nginx, keepalive"
      of_nginx["return_200"]; of_nginx["keepalive"]
      print_row("request", "asked", "connections", "requests/s", "CPU us", "p99 ms", "compared")
      instances = split("main return_200 follower n1 keepalive", order, " ")
      for (n = 1; n <= count; n++) {
        print ""
        for (m = 1; m <= instances; m++) {
          row = groups[n] " " order[m]
          split(row, part, " ")
          verb = part[1] (part[3] > 1 ? " x " depth : "")
          if (row in error) {
            print_row(verb, title[part[4]], part[2], "error", "-", "-", error[row])
            bad = 1
          } else if (row in seen)
            print_row(verb, title[part[4]], part[2], sprintf("%.0f", median(rate, row)), sprintf("%.1f", median(cpu, row)),
              sprintf("%.2f", median(p99, row)), compared(row, part))
        }
      }
      print ""
      print_row("view change", "a fourth node joins", "-", keys, "-", "-", "keys/s: " view_keys / 4 " of " view_keys " keys move")
      exit bad
    }' "$work/cells"
}

bench() {
  local key nginx redis etcd idle_cpu longest_wait keys_a_second key_bytes redis_bytes connection_kib
  local puts_1 gets_1 puts_3 gets_3 puts_etcd caught_up
  export LC_ALL=C # numbers with a point
  nginx=$(PATH=$PATH:/usr/local/sbin:/usr/sbin command -v nginx)
  redis=$(command -v redis-server)
  etcd=$(command -v etcd)
  write_wrk_script
  start_benched || return 1
  measure_all
  echo "test.sh: a view change, memory" >&2
  measure_view_change
  measure_idle_store
  measure_key_memory
  measure_connection_memory
  echo "test.sh: replicas" >&2
  measure_replicas

  local model
  model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
  printf '%s, %s cores, %s; wrk %s' "${model:-unknown CPU}" "$(nproc)" "$(uname -srm)" "$(wrk -v 2>&1 | awk 'NR == 1 { print $2 }')"
  [ -z "$nginx" ] || printf ', nginx %s' "$("$nginx" -v 2>&1 | sed 's|.*/||')"
  [ -z "$redis" ] || printf ', redis %s' "$("$redis" --version | sed 's/.* v=\([^ ]*\) .*/\1/')"
  printf '\n\n'
  local complete=true
  print_table || complete=false
  [[ "$puts_1 $gets_1 $puts_3 $gets_3 $puts_etcd $caught_up" != *error* ]] || complete=false
  [[ "$keys_a_second $longest_wait $idle_cpu $key_bytes $redis_bytes $connection_kib" != *error* ]] || complete=false
  cat <<END

compared: "1.20 x keepalive, 0.90 x its CPU" is 1.20 times the requests/s of that row of nginx, with 0.90 times its CPU a request:
the median of what each round, a second for each row, gives by itself. The other numbers are medians over the $ROUNDS rounds too.
CPU us: microseconds of CPU time a request, of the process that the client talks to (nginx: of its 2 workers).
"x $PIPELINED": pipelined, $PIPELINED requests in one write; p99 is that of the $PIPELINED together.
The longest wait of a client that reads during the view changes, new connections included: $longest_wait ms.
CPU of an idle store of $IDLE_NODES nodes: $idle_cpu% of one core in all.
Memory of a key: $key_bytes bytes ($MEMORY_KEYS keys of 10 bytes with values of 10 bytes), Redis: $redis_bytes.
Memory of an idle connection: $connection_kib ($MEMORY_CLIENTS of them).
END
  cat <<END
Three nodes with three replicas, 64 connections to one of them: PUT $puts_3/s, $(over "$puts_3" "$puts_1") x those with one replica, $(over "$puts_3" "$puts_etcd") x those of
three nodes of etcd ($puts_etcd/s, through its JSON gateway, data in memory); GET $gets_3/s, $(over "$gets_3" "$gets_1") x those with one replica.
A replica that starts again: $caught_up keys/s, from its start on.
END
  [ -n "$etcd" ] || echo "etcd is not installed: apt-get install etcd-server adds its PUTs."
  [ -n "$nginx" ] || echo "nginx is not installed: apt-get install nginx adds its rows and the ratios."
  [ -n "$redis" ] || echo "Redis is not installed: apt-get install redis-server adds its memory of a key."
  "$complete"
}

# ---- The grader: any image, as a black box ---------------------------------------------------------------------------
#
# It asks only for what the assignments ask for: JSON is compared with its members in any order, and with more of them
# than expected. Each section has containers of its own. When they cannot be asked (one did not come up, or the time is
# over), $hopeless says why, and every check that is left fails with that sentence: so the maximum is the same for all images.

readonly GRADED_SECTIONS=(single forwarding shards replicas)
readonly COMES_UP_WITHIN=20  # seconds; interpreters take their time
readonly SETTLES_WITHIN=10   # seconds; then replicas agree
image='' served=8080 prefix=/kv-store style=text patience_of_request=10 limit=600
sections=() section='' hopeless=''
points=0 points_of_all=0 points_of_section=0 points_of_section_of_all=0 checks=0 wrong=0 silent=0
settled=0            # the second by which what has happened last is known to all nodes
sent=()              # the requests of the check, as curl lines
want='' got=''       # what it expected and what came
kept='' kept_sent=() # an answer that was kept, and its requests
held='' keys_of=()   # the key count of a node, and those of several
no_answer=''         # why there was none, if there was none
status='' body=''    # the last answer; no status: there was none
hosts='' first_host=0 # of the network: its first three numbers, and the last number of the network itself

usage() { sed -n '2,22s/^# \{0,1\}//p' "$0"; }
# refuse_to_grade SENTENCE: nothing can be graded, through no fault of the image. Machines are told in their own form.
refuse_to_grade() {
  case $style in
    tap) printf 'TAP version 13\nBail out! %s\n' "$1" ;;
    json) printf '{"score":0,"output":"%s","tests":[]}\n' "$(tr '\0-\37' ' ' <<<"${1//[\\\"]/\'}" | sed 's/ *$//')" ;;
  esac
  echo "test.sh: $1" >&2
  exit 2
}

read_grade_options() { # ARGUMENT...
  local words=()
  while [ $# -gt 0 ]; do
    case $1 in
      --tap | --json)
        [ "$style" = text ] || [ "$style" = "${1#--}" ] || refuse_to_grade "--tap or --json, not both"
        style=${1#--}
        ;;
      --port | --prefix | --timeout | --limit)
        [ $# -gt 1 ] || refuse_to_grade "$1 needs a value"
        set_grade_option "$1" "$2"
        shift
        ;;
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
    [[ " ${GRADED_SECTIONS[*]} " == *" $section "* ]] || refuse_to_grade "no section '$section'; there are ${GRADED_SECTIONS[*]}"
  done
}
set_grade_option() { # OPTION VALUE
  case $1 in
    --prefix) [[ $2 =~ ^(/[A-Za-z0-9._~-]+)*$ ]] || refuse_to_grade "--prefix is a path, /kvs for instance, not '$2'" ;;
    *) [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || refuse_to_grade "$1 is a whole number from 1, not '$2'" ;;
  esac
  case $1 in
    --port)
      [ "$2" -lt 65536 ] || refuse_to_grade "--port is a number up to 65535, not $2"
      served=$2
      ;;
    --prefix) prefix=$2 ;;
    --timeout) patience_of_request=$2 ;;
    --limit) limit=$2 ;;
  esac
}
need_for_grading() {
  command -v curl >/dev/null || refuse_to_grade "curl is missing: apt-get install curl"
  command -v jq >/dev/null || refuse_to_grade "jq is missing: apt-get install jq"
  command -v docker >/dev/null || refuse_to_grade "docker is missing: apt-get install docker.io"
  docker info >/dev/null 2>&1 || refuse_to_grade "no Docker engine answers"
  docker image inspect "$image" >/dev/null 2>&1 || timeout "$limit" docker pull -q "$image" >/dev/null 2>"$work/error" ||
    refuse_to_grade "no image $image: $(tail -n 1 "$work/error")"
}

# seconds_left MOST: to the end of the time in all, 1 at least.
seconds_left() { echo $((limit - SECONDS < 1 ? 1 : limit - SECONDS < $1 ? limit - SECONDS : $1)); }
# given_up: whether this section cannot be asked any more.
given_up() {
  [ "$SECONDS" -lt "$limit" ] || hopeless="the time in all is over, $limit s (--limit)"
  [ -n "$hopeless" ]
}
# again_until DEADLINE COMMAND...: polls.
again_until() {
  until "${@:2}"; do
    [ "$SECONDS" -lt "$1" ] && ! given_up || return
    sleep 0.1
  done
}

# ---- The grader: containers ------------------------------------------------------------------------------------------

# engine ARGUMENT...: docker, which does not hang. It is out of reach of Ctrl-C, or a container would come up behind our back.
engine() { timeout 60 docker "$@" </dev/null 2>"$work/error"; }
# engine_must ARGUMENT...: when Docker refuses, the section is over.
engine_must() { engine "$@" >/dev/null || hopeless="Docker does not $1: $(tail -n 1 "$work/error")"; }

# The assignments give containers fixed addresses. Docker lets us choose them only in a subnet that was given by name: the
# one that it has just found to be free.
create_network() {
  local subnet try
  for try in {1..5}; do
    engine network create --label "kv-grade=$name" "$name" >/dev/null || return
    subnet=$(engine network inspect -f '{{(index .IPAM.Config 0).Subnet}}' "$name")
    engine network rm "$name" >/dev/null
    # Another grader may have been quicker.
    engine network create --label "kv-grade=$name" --subnet "$subnet" "$name" >/dev/null || continue
    subnet=${subnet%/*} hosts=${subnet%.*} first_host=${subnet##*.}
    return
  done
  echo "test.sh: no subnet after $try tries" >&2
  return 1
}
# place NODE...: fixes the addresses of nodes. The network's first one is the host's.
place() {
  local node
  for node in "$@"; do address[$node]=$hosts.$((first_host + 2 + ${#address[@]})):$served; done
}

# bring_up NODE...: makes containers with their settings, starts them, and waits until each answers.
bring_up() {
  local node
  for node in "$@"; do given_up || make_container "$node"; done
  for node in "$@"; do given_up || await_container "$node"; done
  settle
}
make_container() { # NODE
  local variables=(-e "PORT=$served") variable
  for variable in ${settings[$1]}; do variables+=(-e "$variable"); done
  process[$1]=$name-$1
  engine_must create --name "${process[$1]}" --label "kv-grade=$name" --network "$name" --ip "${address[$1]%:*}" \
    -p "127.0.0.1::$served" "${variables[@]}" "$image"
  given_up || engine_must start "${process[$1]}"
}
await_container() { # NODE
  again_until $((SECONDS + COMES_UP_WITHIN)) answers_or_ended "$1" || {
    given_up || hopeless="$1 gave no HTTP answer on port $served within $COMES_UP_WITHIN s of its start"
  }
}
# answers_or_ended NODE: any answer will do, to a key or to no path at all.
answers_or_ended() {
  local state
  state=$(engine inspect -f '{{.State.Running}} {{.State.ExitCode}}' "${process[$1]}")
  [ "${state% *}" = true ] || { hopeless="$1 ended with status ${state#* } before it answered" && return; }
  find_port "$1"
  curl -s -o /dev/null -m 2 "${url[$1]}$prefix/none" || curl -s -o /dev/null -m 2 "${url[$1]}/"
}
# A container that has been started again, or is in another network, has another port.
find_port() { url[$1]=http://$(engine port "${process[$1]}" "$served/tcp" | head -n 1); } # NODE

# settle: something has happened that nodes take time to find out.
settle() { settled=$((SECONDS + SETTLES_WITHIN)); }
stop_container() { given_up || engine_must stop -t 1 "${process[$1]}"; }  # NODE
kill_container() { # NODE
  given_up || engine_must kill "${process[$1]}"
  settle
}
start_again() { # NODE
  given_up || engine_must start "${process[$1]}"
  given_up || await_container "$1"
  settle
}
# cut_off NODE: from the other nodes. We still reach it, over Docker's own network.
cut_off() {
  given_up || engine_must network connect bridge "${process[$1]}"
  given_up || engine_must network disconnect "$name" "${process[$1]}"
  given_up || find_port "$1"
  settle
}
join_up() { # NODE
  given_up || engine_must network connect --ip "${address[$1]%:*}" "$name" "${process[$1]}"
  given_up || engine_must network disconnect bridge "${process[$1]}"
  given_up || find_port "$1"
  settle
}
remove_containers() { docker ps -aq --filter "label=kv-grade=$name" | xargs -r timeout 60 docker rm -f -v >/dev/null 2>&1; }
clean_grade() {
  remove_containers
  docker network ls -q --filter "label=kv-grade=$name" | xargs -r docker network rm >/dev/null 2>&1
}

# ---- The grader: questions -------------------------------------------------------------------------------------------

# as_typed WORD...: a command line that can be pasted.
as_typed() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    words+=("$word")
  done
  echo "${words[*]}"
}

# fetch NODE VERB PATH [CURL ARGUMENT...]: prints body and status of each answer, on lines of their own. A path like /keys/a[1-9]
# is nine requests, and the first that is not answered is the last. $fed is a command whose output curl reads.
fetch() {
  local seconds line
  seconds=$(seconds_left "$patience_of_request")
  line=$(as_typed curl -m "$seconds" -X "$2" "${url[$1]}$prefix$3" "${@:4}")
  [ -z "${fed:-}" ] || line="{ $fed; } | $line"
  sent+=("$line")
  { if [ -n "${fed:-}" ]; then bash -c "$fed"; fi; } |
    timeout --foreground "$(seconds_left "$limit")" curl -s -S --fail-early -m "$seconds" -X "$2" -w '\n%{http_code}\n' "${url[$1]}$prefix$3" "${@:4}" 2>"$work/error" |
    tr -d '\0' >"$work/answer"
  local ended=${PIPESTATUS[1]}
  no_answer=''
  case $ended in
    0) return 0 ;;
    28 | 124) no_answer="no answer within $seconds s" ;;
    7) no_answer="no answer: connection refused" ;;
    52 | 56) no_answer="no answer: the connection was closed" ;;
    *) no_answer="no answer: $(head -n 1 "$work/error")" ;;
  esac
  return 1
}
# request NODE VERB PATH [CURL ARGUMENT...]: asks once; sets $status, $body and $got.
request() {
  status='' body=''
  fetch "$@" || { got=$no_answer && return 1; }
  status=$(tail -n 1 "$work/answer") body=$(head -n -1 "$work/answer")
  got="$status $body"
  jq -e 'type == "object"' >/dev/null 2>&1 <<<"$body" || got+=" (which is no JSON object)"
}

# Whether what is expected is within what came: in objects there may be more members. The order of an array counts.
# shellcheck disable=SC2016 # the variables are jq's
readonly WITHIN='def within($got): . as $want
  | if type == "object" then ($got | type) == "object" and all(keys[]; . as $k | ($got | has($k)) and ($want[$k] | within($got[$k])))
    elif type == "array" then ($got | type) == "array" and length == ($got | length) and all(range(length); . as $i | $want[$i] | within($got[$i]))
    else . == $got end;'

# Predicates: each sets $want and $got.

# answers STATUS JSON NODE VERB PATH [CURL ARGUMENT...]
answers() {
  want="$1 $2"
  request "${@:3}" && [ "$status" = "$1" ] && jq -e -s --argjson want "$2" "$WITHIN length == 1 and (.[0] as \$got | \$want | within(\$got))" >/dev/null 2>&1 <<<"$body"
}
# collect COUNT NODE VERB PATH [CURL ARGUMENT...]: asks for so many answers; they are in $work/answers, as [{"status","body"},...].
collect() {
  fetch "${@:2}" || { got="$no_answer (request $(($(grep -c -x '[1-9][0-9][0-9]' "$work/answer") + 1)) of $1)" && return 1; }
  jq -n -c '[foreach inputs as $x ({}; if $x | type == "number" then {status: $x, body: .next, done: true} else {next: $x} end; select(.done) | {status, body})]' \
    "$work/answer" >"$work/answers" 2>/dev/null || { got="an answer that is no JSON: $(head -c 300 "$work/answer")" && return 1; }
  got="$(jq length "$work/answers") answers"
  [ "$got" = "$1 answers" ]
}
# all_answer COUNT STATUS JSON NODE VERB PATH [CURL ARGUMENT...]
all_answer() {
  want="$1 times $2 $3"
  collect "$1" "${@:4}" || return
  got=$(jq -r --argjson status "$2" --argjson want "$3" "$WITHIN"'
    map(select(.status != $status or (.body as $got | $want | within($got) | not))) as $other
    | "\(length - ($other | length)) times" + ($other[:1][] | "; the first other answer: \(.status) \(.body | tojson)") // "\(length) times"' "$work/answers")
  [ "$got" = "$1 times" ]
}
# keep_answer: the last one, for checks of its parts.
keep_answer() { kept=$body kept_sent=("${sent[@]}"); }
# told FILTER EXPECTED: what jq makes of the answer that was kept.
told() {
  sent=("${kept_sent[@]}")
  want="$1 is $2"
  got="$1 is $(jq -c "$1" 2>/dev/null <<<"$kept")"
  [ "$got" = "$want" ] || { got+=" in $kept" && return 1; }
}

# ---- The grader: checks and their report -----------------------------------------------------------------------------

# judge POINTS WHAT PREDICATE...: a check. It may become true as late as $by.
judge() {
  want='' got='' sent=() no_answer='' body=''
  if given_up; then
    got=$hopeless
  elif attempt "${@:3}"; then
    report "$1" "$1" "$2" ''
    return
  else
    while [ "$SECONDS" -lt "${by:-0}" ] && ! given_up; do
      sleep 0.2
      attempt "${@:3}" && report "$1" "$1" "$2" '' && return
    done
  fi
  if [ -n "$hopeless$no_answer" ]; then silent=$((silent + 1)); else wrong=$((wrong + 1)); fi
  report 0 "$1" "$2" "$(explain)"
}
attempt() { sent=() no_answer='' && "$@"; }
wants() { judge "$1" "$2" answers "${@:3}"; }        # POINTS WHAT STATUS JSON NODE VERB PATH [CURL ARGUMENT...]
wants_all() { judge "$1" "$2" all_answer "${@:3}"; } # POINTS WHAT COUNT STATUS JSON NODE VERB PATH [CURL ARGUMENT...]

# explain: why a check failed.
explain() {
  local line
  for line in "${sent[@]}"; do printf 'sent      %.1000s\n' "$line"; done
  [ -z "$want" ] || printf 'expected  %.600s\n' "$want"
  printf 'got       %.600s\n' "$got"
}
# report POINTS OF WHAT EXPLANATION
report() {
  local what="$section: $3" mark=FAIL
  checks=$((checks + 1))
  points_of_section=$((points_of_section + $1)) points_of_section_of_all=$((points_of_section_of_all + $2))
  [ "$1" -lt "$2" ] || mark=ok
  case $style in
    text) printf '%-5s %s/%s  %s\n' "$mark" "$1" "$2" "$what" && indent '           ' "$4" ;;
    tap) printf '%s %s - %s (%s of %s)\n' "$([ "$mark" = ok ] || printf 'not ')ok" "$checks" "$what" "$1" "$2" && indent '# ' "$4" ;;
    json) jq -n -c --arg name "$what" --argjson score "$1" --argjson of "$2" --arg output "$4" '{name: $name, score: $score, max_score: $of, output: $output}' >>"$work/tests" ;;
  esac
}
# tell TEXT: what is no check.
tell() {
  case $style in
    text) printf '%s\n' "$1" ;;
    tap) indent '# ' "$1" ;;
    json) printf '%s\n' "$1" >>"$work/told" ;;
  esac
}
indent() { [ -z "$2" ] || printf '%s\n' "$2" | sed "s/^/$1/"; }

grade_section() { # SECTION
  section=$1 hopeless='' points_of_section=0 points_of_section_of_all=0
  address=() url=() process=() settings=()
  "grade_$section"
  [ "$points_of_section" -eq "$points_of_section_of_all" ] || tell_logs
  tell "$section: $points_of_section of $points_of_section_of_all points"
  points=$((points + points_of_section)) points_of_all=$((points_of_all + points_of_section_of_all))
  remove_containers
}
tell_logs() {
  local node lines
  for node in $(printf '%s\n' "${!process[@]}" | sort); do
    lines=$(timeout 10 docker logs --tail 5 "${process[$node]}" 2>&1 | tr -d '\000-\010\013-\037' | cut -c 1-300)
    tell "last lines of $node's log:$(indent '  ' "${lines:-(there are none)}" | sed '1s/^/\n/')"
  done
}

grade() {
  need_for_grading
  create_network || refuse_to_grade "Docker makes no network: $(tail -n 1 "$work/error")"
  [ "$style" != tap ] || echo 'TAP version 13'
  for section in "${sections[@]}"; do grade_section "$section"; done
  tell "total: $points of $points_of_all points; $wrong wrong, $silent without an answer"
  case $style in
    tap) echo "1..$checks" ;;
    json) jq -s --argjson score "$points" --rawfile output "$work/told" '{score: $score, output: $output, tests: .}' "$work/tests" ;;
  esac
  [ "$points" -eq "$points_of_all" ]
}

# ---- The grader: one instance, and a follower ------------------------------------------------------------------------

readonly NO_KEY='{"result":"Error","msg":"Key does not exist"}'
readonly NO_VALUE='{"result":"Error","msg":"No value provided"}'
readonly BAD_KEY='{"result":"Error","msg":"Key not valid"}'
readonly TOO_LARGE='{"result":"Error","msg":"Object too large. Size limit is 1MB"}'
readonly NO_MAIN='{"result":"Error","msg":"Server unavailable"}'
readonly NEW='{"replaced":"False","msg":"New key created"}'
readonly REPLACED='{"replaced":"True","msg":"Value of existing key replaced"}'
readonly DELETED='{"result":"Success"}'
found_value() { echo "{\"result\":\"Success\",\"value\":\"$1\"}"; } # VALUE
# letters COUNT: a command that prints "val=" and so many letters; they are too many for a command line.
letters() { printf '%s' "printf val= && head -c $1 /dev/zero | tr '\\0' v"; }

grade_single() {
  local long
  long=$(printf 'k%.0s' {1..200})
  place main
  settings[main]=
  bring_up main
  wants 1 "GET of no key" 404 "$NO_KEY" main GET /foo
  wants 1 "DELETE of no key" 404 "$NO_KEY" main DELETE /foo
  wants 1 "PUT makes a key" 201 "$NEW" main PUT /foo -d val=bar
  wants 1 "GET finds it" 200 "$(found_value bar)" main GET /foo
  wants 1 "PUT replaces the value" 200 "$REPLACED" main PUT /foo -d val=baz
  wants 1 "GET finds the new value" 200 "$(found_value baz)" main GET /foo
  wants 1 "PUT makes another key" 201 "$NEW" main PUT /other_2 -d val=2
  wants 1 "... and the first has kept its value" 200 "$(found_value baz)" main GET /foo
  wants 1 "case counts in keys" 404 "$NO_KEY" main GET /FOO
  wants 1 "PUT of a value with spaces and signs" 200 "$REPLACED" main PUT /other_2 --data-urlencode 'val=a b & c=d + 100%'
  wants 1 "... which comes back as it was" 200 "$(found_value 'a b & c=d + 100%')" main GET /other_2
  wants 1 "PUT without a value" 403 "$NO_VALUE" main PUT /foo
  wants 1 "a key of 200 characters" 201 "$NEW" main PUT "/$long" -d val=long
  wants 1 "... which is found" 200 "$(found_value long)" main GET "/$long"
  wants 1 "a key of 201 characters is too long" 403 "$BAD_KEY" main PUT "/${long}k" -d val=long
  fed=$(letters 900000) wants 1 "a value of 900,000 bytes" 201 "$NEW" main PUT /large -H Expect: --data-binary @-
  judge 1 "... which comes back" has_length 900000 main GET /large
  fed=$(letters 1100000) wants 1 "a value of 1,100,000 bytes is too large" 403 "$TOO_LARGE" main PUT /foo -H Expect: --data-binary @-
  wants 1 "a refused PUT leaves the value" 200 "$(found_value baz)" main GET /foo
  wants 1 "DELETE removes the key" 200 "$DELETED" main DELETE /foo
  wants 1 "GET of a deleted key" 404 "$NO_KEY" main GET /foo
  wants 1 "DELETE of a deleted key" 404 "$NO_KEY" main DELETE /foo
  wants 1 "PUT makes a deleted key new" 201 "$NEW" main PUT /foo -d val=again
  wants 1 "... with the new value" 200 "$(found_value again)" main GET /foo
  wants 1 "the other key is still there" 200 "$(found_value 'a b & c=d + 100%')" main GET /other_2
}
# has_length LENGTH NODE VERB PATH: the value is a string of so many characters.
has_length() {
  want="200 and a value of $1 characters"
  request "${@:2}" || return
  [ "$status" != 200 ] || got="200 and a value of $(jq -r '.value | strings | length' 2>/dev/null <<<"$body") characters"
  [ "$got" = "$want" ]
}

grade_forwarding() {
  place main follower
  settings[main]=
  settings[follower]="FORWARDING_ADDRESS=${address[main]} MAINIP=${address[main]}"
  bring_up main follower
  wants 1 "GET of no key through the follower" 404 "$NO_KEY" follower GET /foo
  wants 1 "DELETE of no key through the follower" 404 "$NO_KEY" follower DELETE /foo
  wants 1 "PUT through the follower makes a key" 201 "$NEW" follower PUT /foo -d val=bar
  wants 1 "... which the main instance has" 200 "$(found_value bar)" main GET /foo
  wants 1 "... and the follower finds" 200 "$(found_value bar)" follower GET /foo
  wants 1 "PUT to the main instance replaces the value" 200 "$REPLACED" main PUT /foo -d val=baz
  wants 1 "... which the follower sees" 200 "$(found_value baz)" follower GET /foo
  wants 1 "PUT through the follower replaces the value" 200 "$REPLACED" follower PUT /foo --data-urlencode 'val=a b & c=d + 100%'
  wants 1 "... which the main instance sees as it was" 200 "$(found_value 'a b & c=d + 100%')" main GET /foo
  wants 1 "PUT without a value through the follower" 403 "$NO_VALUE" follower PUT /foo
  wants 1 "a key that is too long, through the follower" 403 "$BAD_KEY" follower PUT "/$(printf 'k%.0s' {1..201})" -d val=1
  wants 1 "DELETE through the follower removes the key" 200 "$DELETED" follower DELETE /foo
  wants 1 "... which the main instance has no more" 404 "$NO_KEY" main GET /foo
  wants 1 "PUT to the main instance makes it again" 201 "$NEW" main PUT /foo -d val=again
  stop_container main
  wants 1 "the main instance has stopped: GET" 501 "$NO_MAIN" follower GET /foo
  wants 1 "the main instance has stopped: PUT" 501 "$NO_MAIN" follower PUT /foo -d val=bar
  wants 1 "the main instance has stopped: DELETE" 501 "$NO_MAIN" follower DELETE /foo
  start_again main
  by=$settled wants 1 "the main instance has started again: the follower reaches it" 404 "$NO_KEY" follower GET /never
  wants 1 "... PUT" 201 "$NEW" follower PUT /back -d val=bar
  wants 1 "... which the main instance has then" 200 "$(found_value bar)" main GET /back
}

# ---- The grader: a store of several nodes ----------------------------------------------------------------------------

readonly ADDED='{"message":"Added successfully","replaced":false}'
readonly UPDATED='{"message":"Updated successfully","replaced":true}'
readonly REMOVED='{"doesExist":true,"message":"Deleted successfully"}'
readonly CHANGED='{"message":"View change successful"}'
retrieved() { echo "{\"doesExist\":true,\"message\":\"Retrieved successfully\",\"value\":\"$1\"}"; } # VALUE
no_such_key() { echo "{\"doesExist\":false,\"error\":\"Key does not exist\",\"message\":\"Error in $1\"}"; } # VERB
error_in_put() { echo "{\"error\":\"$1\",\"message\":\"Error in PUT\"}"; } # ERROR
value_is() { echo "{\"value\":\"$1\"}"; } # VALUE
# addresses NODE...: a JSON array of them, sorted.
addresses() { view "$@" | jq -R -c 'split(",") | sort'; }

grade_shards() {
  local node view
  place node1 node2 node3
  view=$(view node1 node2)
  for node in node1 node2; do settings[$node]="ADDRESS=${address[$node]} VIEW=$view"; done
  bring_up node1 node2
  for node in node1 node2; do
    by=$settled wants 1 "$node is ready, and has no such key" 404 "$(no_such_key GET)" "$node" GET /keys/none
  done
  wants_all 1 "60 keys are put through node1" 60 201 "$ADDED" node1 PUT '/keys/a[1-60]' "${json[@]}" -d "$(value_is 'of a')"
  wants_all 1 "60 keys are put through node2" 60 201 "$ADDED" node2 PUT '/keys/b[1-60]' "${json[@]}" -d "$(value_is 'of b')"
  for node in node1 node2; do
    wants 1 "$node says how many keys it has" 200 '{"message":"Key count retrieved successfully"}' "$node" GET /key-count
  done
  judge 1 "the key counts add up" add_up 120 node1 node2
  judge 1 "the keys are on both nodes, roughly balanced" are_balanced node1 node2
  wants_all 1 "node1 finds the keys that node1 took" 60 200 "$(retrieved 'of a')" node1 GET '/keys/a[1-60]'
  wants_all 1 "node1 finds the keys that node2 took" 60 200 "$(retrieved 'of b')" node1 GET '/keys/b[1-60]'
  wants_all 1 "node2 finds the keys that node1 took" 60 200 "$(retrieved 'of a')" node2 GET '/keys/a[1-60]'
  wants_all 1 "node2 finds the keys that node2 took" 60 200 "$(retrieved 'of b')" node2 GET '/keys/b[1-60]'
  judge 1 "node1 gives node2's address with node2's keys, and none with its own" tells_owner node1 node2
  judge 1 "node2 gives node1's address with node1's keys, and none with its own" tells_owner node2 node1
  wants_all 1 "node2 replaces the values of all that node1 took" 60 200 "$UPDATED" node2 PUT '/keys/a[1-60]' "${json[@]}" -d "$(value_is new)"
  wants_all 1 "... and node1 finds the new ones" 60 200 "$(retrieved new)" node1 GET '/keys/a[1-60]'
  wants 1 "PUT without a value" 400 "$(error_in_put 'Value is missing')" node1 PUT /keys/a1 "${json[@]}" -d '{}'
  wants 1 "PUT with a key of 51 characters" 400 "$(error_in_put 'Key is too long')" node1 PUT "/keys/$(printf 'k%.0s' {1..51})" "${json[@]}" -d "$(value_is long)"
  wants_all 1 "node1 deletes 10 of the keys that node2 took" 10 200 "$REMOVED" node1 DELETE '/keys/b[51-60]'
  wants_all 1 "... which node2 does not find any more" 10 404 "$(no_such_key GET)" node2 GET '/keys/b[51-60]'
  wants_all 1 "... and cannot delete again" 10 404 "$(no_such_key DELETE)" node2 DELETE '/keys/b[51-60]'
  judge 1 "the key counts add up after the deletions" add_up 110 node1 node2

  view=$(view node1 node2 node3)
  settings[node3]="ADDRESS=${address[node3]} VIEW=$view"
  bring_up node3
  wants 2 "a view change adds node3" 200 "$CHANGED" node1 PUT /view-change "${json[@]}" -d "{\"view\":\"$view\"}"
  keep_answer
  judge 1 "its answer has the addresses of all nodes" told '[.shards[].address] | sort' "$(addresses node1 node2 node3)"
  judge 1 "its answer has key counts that add up" told '[.shards[]."key-count"] | add' 110
  judge 1 "the nodes have as many keys as its answer says" are_counted_alike node1 node2 node3
  judge 1 "the key counts of the three nodes add up" add_up 110 node1 node2 node3
  judge 1 "the keys are on all three nodes, roughly balanced" are_balanced node1 node2 node3
  for node in node1 node2 node3; do
    wants_all 1 "after the view change $node finds the keys that node1 took" 60 200 "$(retrieved new)" "$node" GET '/keys/a[1-60]'
    wants_all 1 "after the view change $node finds the keys that node2 took" 50 200 "$(retrieved 'of b')" "$node" GET '/keys/b[1-50]'
  done
  wants_all 1 "after the view change node3 takes new keys" 10 201 "$ADDED" node3 PUT '/keys/c[1-10]' "${json[@]}" -d "$(value_is 'of c')"
  wants_all 1 "... which node1 finds" 10 200 "$(retrieved 'of c')" node1 GET '/keys/c[1-10]'
}
# count_keys NODE: sets $held to the number that it tells.
count_keys() {
  held=''
  request "$1" GET /key-count || return
  held=$(jq -r '."key-count" | numbers | select(. >= 0 and . < 1000000 and . == floor)' 2>/dev/null <<<"$body")
  [ -n "$held" ]
}
# count_all NODE...: sets $keys_of to the numbers of all.
count_all() {
  local node held
  keys_of=()
  for node in "$@"; do count_keys "$node" && keys_of+=("$held") || return; done
}
# add_up COUNT NODE...
add_up() {
  want="$1 keys in all"
  count_all "${@:2}" || return
  got="$(sum "${keys_of[*]}") keys in all: ${keys_of[*]}"
  [ "${got%:*}" = "$want" ]
}
# are_counted_alike NODE...: as in the answer to the view change that was kept.
are_counted_alike() {
  local counts
  counts=$(jq -r '[.shards[]."key-count"] | sort | join(" ")' 2>/dev/null <<<"$kept")
  want="key counts, sorted: ${counts:-those of the answer, which has none}"
  count_all "$@" || return
  got="key counts, sorted: $(printf '%s\n' "${keys_of[@]}" | sort -n | paste -sd' ')"
  [ "$got" = "$want" ]
}
# are_balanced NODE...: none has less than half or more than twice of the mean.
are_balanced() {
  local total held
  want='each node has from 1/2 to 2 times the mean'
  count_all "$@" || return
  got="keys: ${keys_of[*]}"
  total=$(sum "${keys_of[*]}")
  [ "$total" -gt 0 ] || return
  for held in "${keys_of[@]}"; do ((held * $# * 2 >= total && held * $# <= total * 2)) || return; done
}
# tells_owner NODE OTHER: of the 120 keys, as many as the other has come with its address, the rest with none.
tells_owner() {
  count_keys "$2" || { want="the key count of $2" && return 1; }
  want="$held answers with ${address[$2]}, $((120 - held)) without an address"
  collect 120 "$1" GET '/keys/[a-b][1-60]' || return
  got=$(jq -r --arg other "${address[$2]}" '[.[].body.address?] | "\(map(select(. == $other)) | length) answers with \($other), \(map(select(. == null)) | length) without an address"' "$work/answers")
  [ "$got" = "$want" ]
}

# ---- The grader: several replicas ------------------------------------------------------------------------------------

readonly UNABLE='{"error":"Unable to satisfy request","message":"Error in GET"}'

# In what follows first and second are the replicas of one shard, third and fourth those of the other.
grade_replicas() {
  local node view first=node1 second=node2 third=node3 fourth=node4 key context='{}'
  local -a own=()
  place node1 node2 node3 node4 node5 node6
  view=$(view node1 node2 node3 node4)
  for node in node1 node2 node3 node4; do settings[$node]="ADDRESS=${address[$node]} VIEW=$view REPL_FACTOR=2"; done
  bring_up node1 node2 node3 node4
  for node in node1 node2 node3 node4; do
    by=$settled wants 1 "$node is ready, and has no such key" 404 "$(no_such_key GET)" "$node" GET /keys/none
  done
  wants 1 "the shards are told" 200 '{"message":"Shard membership retrieved successfully"}' node1 GET /shards
  keep_answer
  judge 1 "... there are two" told '.shards | sort' '["1","2"]'
  for key in 1 2; do
    wants 1 "shard $key is told" 200 "{\"message\":\"Shard information retrieved successfully\",\"shard-id\":\"$key\"}" node1 GET "/shards/$key"
    keep_answer
    judge 1 "... shard $key has two replicas" told '.replicas | length' 2
  done
  judge 1 "every node is in one shard" are_members 2 node1 node2 node3 node4
  find_second

  wants_all 1 "60 keys are put through node1" 60 201 "$ADDED" node1 PUT '/keys/a[1-60]' "${json[@]}" -d "$(value_is 'of a')"
  wants_all 1 "60 keys are put through node4" 60 201 "$ADDED" node4 PUT '/keys/b[1-60]' "${json[@]}" -d "$(value_is 'of b')"
  settle
  for node in node1 node2 node3 node4; do
    by=$settled wants_all 1 "$node finds the keys that node1 took" 60 200 "$(retrieved 'of a')" "$node" GET '/keys/a[1-60]'
    by=$settled wants_all 1 "$node finds the keys that node4 took" 60 200 "$(retrieved 'of b')" "$node" GET '/keys/b[1-60]'
  done
  by=$settled judge 1 "the key counts of the shards add up" shards_add_up 120 2
  by=$settled judge 1 "$first and $second have the same key count" count_the_same "$first" "$second"
  by=$settled judge 1 "$third and $fourth have the same key count" count_the_same "$third" "$fourth"
  for node in "$first" "$second"; do
    by=$settled judge 1 "$node answers for all keys of its shard itself, and for no others" answers_for_its_own "$node"
  done
  find_own_keys

  kill_container "$second"
  for node in "$first" "$third" "$fourth"; do
    by=$settled wants_all 1 "$second is killed: $node reads" 20 200 "$(retrieved 'of a')" "$node" GET '/keys/a[1-20]'
  done
  wants_all 1 "$second is killed: $first writes" 10 200 "$UPDATED" "$first" PUT '/keys/a[1-10]' "${json[@]}" -d "$(value_is killed)"
  wants_all 1 "$second is killed: $third writes" 10 200 "$UPDATED" "$third" PUT '/keys/a[11-20]' "${json[@]}" -d "$(value_is killed)"
  wants_all 1 "$second is killed: $fourth makes keys" 20 201 "$ADDED" "$fourth" PUT '/keys/c[1-20]' "${json[@]}" -d "$(value_is 'of c')"
  wants_all 1 "$second is killed: $first finds them" 20 200 "$(retrieved 'of c')" "$first" GET '/keys/c[1-20]'
  start_again "$second"
  by=$settled wants_all 1 "$second is started again: it finds what was written" 20 200 "$(retrieved killed)" "$second" GET '/keys/a[1-20]'
  by=$settled wants_all 1 "$second is started again: it finds what was made" 20 200 "$(retrieved 'of c')" "$second" GET '/keys/c[1-20]'
  by=$settled judge 1 "$second is started again: it has as many keys as $first" count_the_same "$first" "$second"
  kill_container "$first"
  by=$settled wants_all 1 "$first is killed then: $second has what was written" 20 200 "$(retrieved killed)" "$second" GET '/keys/a[1-20]'
  by=$settled wants_all 1 "$first is killed then: $third finds it too" 20 200 "$(retrieved killed)" "$third" GET '/keys/a[1-20]'
  start_again "$first"
  by=$settled judge 1 "$first is started again: it has as many keys as $second" count_the_same "$first" "$second"

  grade_causal_contexts
  grade_cut_network

  view=$(view node1 node2 node3 node4 node5 node6)
  for node in node5 node6; do settings[$node]="ADDRESS=${address[$node]} VIEW=$view REPL_FACTOR=2"; done
  bring_up node5 node6
  wants 2 "a view change makes three shards of six nodes" 200 "$CHANGED" node1 PUT /view-change "${json[@]}" -d "{\"view\":\"$view\",\"repl-factor\":2}"
  keep_answer
  settle
  judge 1 "its answer has three shards" told '[.shards[]."shard-id"] | sort' '["1","2","3"]'
  judge 1 "its answer has two replicas of each" told '[.shards[].replicas | length]' '[2,2,2]'
  judge 1 "its answer has every node once" told '[.shards[].replicas[]] | sort' "$(addresses node1 node2 node3 node4 node5 node6)"
  by=$settled judge 1 "the six nodes are in three shards" are_members 3 node1 node2 node3 node4 node5 node6
  by=$settled judge 1 "the key counts of the three shards add up" shards_add_up 140 3
  for node in node1 node4 node5 node6; do
    by=$settled wants_all 1 "after the view change $node finds the keys that were put first" 60 200 "$(retrieved 'of b')" "$node" GET '/keys/b[1-60]'
    by=$settled wants_all 1 "after the view change $node finds those that came later" 20 200 "$(retrieved 'of c')" "$node" GET '/keys/c[1-20]'
  done
}

# Uses first, second and own of grade_replicas.
grade_causal_contexts() {
  wants 1 "a write without anything known gets a causal-context" 200 "$UPDATED" "$first" PUT "/keys/${own[0]}" "${json[@]}" -d '{"value":"caused","causal-context":{}}'
  keep_answer
  judge 1 "... it is in the answer" told 'has("causal-context")' true
  context=$(context_of "$kept")
  wants 1 "$second, given it, answers with what was written" 200 "$(retrieved caused)" "$second" GET "/keys/${own[0]}" "${json[@]}" -d "{\"causal-context\":$context}"
  keep_answer
  judge 1 "... and hands on a causal-context" told 'has("causal-context")' true
  context=$(context_of "$kept")
}
context_of() { jq -c '."causal-context" // {}' 2>/dev/null <<<"$1" || echo '{}'; } # BODY

# second is cut off from all others, and clients reach both sides.
grade_cut_network() {
  local key=${own[0]}
  cut_off "$second"
  by=$settled wants_all 1 "$second is cut off: $third reads" 20 200 "$(retrieved 'of c')" "$third" GET '/keys/c[1-20]'
  by=$settled wants 1 "$second is cut off: it reads a key of its shard" 200 "$(retrieved caused)" "$second" GET "/keys/$key"
  wants 1 "$second is cut off: $first writes" 200 "$UPDATED" "$first" PUT "/keys/$key" "${json[@]}" -d "{\"value\":\"unseen\",\"causal-context\":$context}"
  context=$(context_of "$body")
  wants 1 "$second is cut off: $third reads what $first wrote" 200 "$(retrieved unseen)" "$third" GET "/keys/$key" "${json[@]}" -d "{\"causal-context\":$context}"
  wants 1 "$second is cut off: it does not answer who has seen more with less" 400 "$UNABLE" "$second" GET "/keys/$key" "${json[@]}" -d "{\"causal-context\":$context}"
  wants 1 "$second is cut off: it writes another key of its shard" 200 "$UPDATED" "$second" PUT "/keys/${own[1]}" "${json[@]}" -d "$(value_is alone)"
  wants 1 "$second is cut off: it reads what it wrote" 200 "$(retrieved alone)" "$second" GET "/keys/${own[1]}"
  wants 1 "both sides write a third key: $first" 200 "$UPDATED" "$first" PUT "/keys/${own[2]}" "${json[@]}" -d "$(value_is 'of first')"
  wants 1 "both sides write a third key: $second" 200 "$UPDATED" "$second" PUT "/keys/${own[2]}" "${json[@]}" -d "$(value_is 'of second')"
  join_up "$second"
  by=$settled wants 1 "the network is whole again: $second has what $first wrote" 200 "$(retrieved unseen)" "$second" GET "/keys/$key" "${json[@]}" -d "{\"causal-context\":$context}"
  by=$settled wants 1 "the network is whole again: $first has what $second wrote" 200 "$(retrieved alone)" "$first" GET "/keys/${own[1]}"
  by=$settled judge 1 "the network is whole again: they agree on what both wrote" agree "${own[2]}" "$first" "$second" "$third"
  by=$settled judge 1 "the network is whole again: they have the same key count" count_the_same "$first" "$second"
}

# are_members COUNT NODE...: so many shards share out these nodes.
are_members() {
  local id list=()
  want="the replicas of $1 shards, sorted: $(addresses "${@:2}")"
  for ((id = 1; id <= $1; id++)); do
    request node1 GET "/shards/$id" || return
    list+=("$(jq -c '.replicas | arrays' 2>/dev/null <<<"$body")")
  done
  got="the replicas of $1 shards, sorted: $(jq -s -c 'add | sort' 2>/dev/null <<<"${list[*]}")"
  [ "$got" = "$want" ]
}
# find_second: who shares the shard of node1; as in the order of the view, if that cannot be found out.
find_second() {
  local id node rest=()
  for id in 1 2; do
    given_up || ! request node1 GET "/shards/$id" || ! jq -e --arg own "${address[node1]}" '.replicas | index($own)' >/dev/null 2>&1 <<<"$body" || break
  done
  for node in node2 node3 node4; do
    if jq -e --arg other "${address[$node]}" '.replicas | index($other)' >/dev/null 2>&1 <<<"$body"; then second=$node; fi
  done
  for node in node2 node3 node4; do [ "$node" = "$second" ] || rest+=("$node"); done
  third=${rest[0]} fourth=${rest[1]}
}
# find_own_keys: keys of the shard of first and second, which they answer for themselves.
find_own_keys() {
  given_up || ! collect 40 "$first" GET '/keys/a[21-60]' ||
    mapfile -t own < <(jq -r 'to_entries[] | select(.value.body | has("address") | not) | "a\(.key + 21)"' "$work/answers" 2>/dev/null)
  own+=(a21 a22 a23)
}
# shards_add_up COUNT SHARDS: as node1 tells them.
shards_add_up() {
  local id list=()
  want="$1 keys in all"
  for ((id = 1; id <= $2; id++)); do
    request node1 GET "/shards/$id" || return
    list+=("$(jq -r '."key-count" | numbers | floor' 2>/dev/null <<<"$body")")
  done
  got="$(sum "${list[*]}") keys in all: ${list[*]}"
  [ "${got%:*}" = "$want" ]
}
# count_the_same NODE OTHER
count_the_same() {
  want="the same key count"
  count_all "$@" || return
  got="key counts: ${keys_of[*]}"
  [ "${keys_of[0]}" = "${keys_of[1]}" ]
}
# answers_for_its_own NODE: to as many of all keys as it has, it adds no address.
answers_for_its_own() {
  count_keys "$1" || { want="the key count of $1" && return 1; }
  want="$held of 120 answers without an address, as many as $1 has keys"
  collect 120 "$1" GET '/keys/[a-b][1-60]' || return
  got="$(jq '[.[].body | objects | select(has("address") | not)] | length' "$work/answers") of 120 answers without an address, as many as $1 has keys"
  [ "$got" = "$want" ]
}
# agree KEY NODE...: all of them give the same value.
agree() {
  local node values=()
  want="the same value from ${*:2}"
  for node in "${@:2}"; do
    request "$node" GET "/keys/$1" || return
    values+=("$status $(jq -c .value 2>/dev/null <<<"$body")")
  done
  got=$(IFS=, && echo "${values[*]}")
  [[ $got == 200* ]] && [ "$(printf '%s\n' "${values[@]}" | sort -u | wc -l)" = 1 ]
}

# ---- The grader graded: servers with one defect each -----------------------------------------------------------------

# write_small_server: a server of the form vocabulary, in Perl, which the base image has. Its JSON is spelled otherwise than
# ours. DEFECT: created (200 in place of 201), delete (it forgets to), silent (a DELETE has no answer), dead (it ends at once).
write_small_server() {
  cat >"$work/server/server.pl" <<'END'
use strict;
use IO::Socket::INET;
my ($defect, %values, @unanswered) = $ENV{DEFECT};
die "server.pl: out of order\n" if $defect eq 'dead';
my $listener = IO::Socket::INET->new(LocalPort => $ENV{PORT}, Listen => 50, ReuseAddr => 1) or die "server.pl: $!\n";
sub answer { # verb, key, body
  my ($verb, $key, $body) = @_;
  my $error = '{ "msg" : "%s", "result" : "Error", "more" : [] }';
  if ($verb eq 'PUT') {
    return 403, sprintf $error, 'Key not valid' unless $key =~ /^\w{1,200}$/a;
    return 403, sprintf $error, 'No value provided' unless $body =~ s/^val=//;
    return 403, sprintf $error, 'Object too large. Size limit is 1MB' if length $body > 1048576;
    my $known = exists $values{$key};
    $values{$key} = $body =~ s/\+/ /gr =~ s/%(..)/chr hex $1/ger =~ s/(["\\])/\\$1/gr;
    return 200, '{ "msg" : "Value of existing key replaced", "replaced" : "True" }' if $known;
    return $defect eq 'created' ? 200 : 201, '{ "msg" : "New key created", "replaced" : "False" }';
  }
  return 404, sprintf $error, 'Key does not exist' unless exists $values{$key};
  return 200, qq({ "value" : "$values{$key}", "result" : "Success" }) if $verb eq 'GET';
  delete $values{$key} unless $defect eq 'delete';
  return 200, '{ "result" : "Success" }';
}
while (my $client = $listener->accept) {
  my ($length, $body) = (0, '');
  my ($verb, $key) = (<$client> // '') =~ m{^(\S+) /kv-store/(\S+)} or next;
  while (<$client>) { last if /^\r?$/; $length = $1 if /^content-length: *(\d+)/i }
  read $client, $body, $length;
  if ($verb eq 'DELETE' && $defect eq 'silent') { push @unanswered, $client; next }
  my ($status, $json) = answer($verb, $key, $body);
  print $client "HTTP/1.1 $status -\r\nConnection: close\r\nContent-Length: ", length $json, "\r\n\r\n$json";
}
END
}
build_small_server() { # DEFECT
  docker build -q -t "$name-server:$1" --build-arg "DEFECT=$1" "$work/server" >/dev/null 2>"$work/build"
}

# verdict ARGUMENT...: what the grader says, in short. The whole is in $work/graded.
verdict() {
  local ended
  (echo "$BASHPID" >>"$work/graders" && exec ./test.sh grade --json "$@") >"$work/graded" 2>"$work/grader.err"
  ended=$?
  jq -r --arg ended "$ended" '([.tests[] | select(.score < .max_score)] | length) as $failed
    | if $failed == 0 and .score == ([.tests[].max_score] | add) then "all points" else "\($failed) failed" end + ", status " + $ended' "$work/graded" || cat "$work/grader.err"
}
# refused_with PATTERN: how many checks failed with it, as the last verdict says.
refused_with() { jq -r '.tests[] | select(.score < .max_score) | .output' "$work/graded" | grep -c "$1"; }
left_of_graders() {
  local pid
  while read -r pid; do docker ps -aq --filter "name=^kv-grade-$pid-" && docker network ls -q --filter "name=^kv-grade-$pid-"; done <"$work/graders" | wc -l
}

test_grader_docker() {
  local defect base
  command -v jq >/dev/null || { echo "test.sh: jq is missing (apt-get install jq): the grader is not tested" >&2 && return; }
  base=$(awk '$1 == "FROM" && $2 ~ /^rust:/ { print $2 }' Dockerfile)
  mkdir "$work/server"
  write_small_server
  printf '%s\n' "FROM $base" 'ARG DEFECT' "ENV DEFECT=\$DEFECT" 'COPY server.pl /' 'CMD ["perl", "/server.pl"]' >"$work/server/Dockerfile"
  for defect in none created delete silent dead; do build_small_server "$defect" || cat "$work/build" >&2; done
  check "grader: this project's own image" "all points, status 0" "$(verdict kv-store:test)"
  check "grader: JSON spelled in another way" "all points, status 0" "$(verdict "$name-server:none" single)"
  check "grader: ... in TAP" "TAP version 13, 25 ok, 1..25" "$(./test.sh grade "$name-server:none" single --tap | awk 'NR == 1 { first = $0 } /^ok / { n++ } END { print first ", " n " ok, " $0 }')"
  check "grader: 200 in place of 201" "5 failed, status 1" "$(verdict "$name-server:created" single)"
  check "grader: ... and that is why" 5 "$(refused_with '^got  *200 .*New key created')"
  check "grader: DELETE forgets to" "3 failed, status 1" "$(verdict "$name-server:delete" single)"
  check "grader: DELETE has no answer" "5 failed, status 1" "$(verdict "$name-server:silent" single --timeout 1)"
  check "grader: ... which is told from a wrong one" 3 "$(refused_with '^got  *no answer within 1 s')"
  check "grader: a server that ends at once" "25 failed, status 1" "$(verdict "$name-server:dead" single)"
  check "grader: ... and that is why" 25 "$(refused_with '^got  *main ended with status .* before it answered')"
  check "grader: the time in all" "status 1" "$(verdict "$name-server:silent" single --limit 4 | grep -o 'status .')"
  check_that "grader: ... ends it" "$(refused_with '^got  *the time in all is over, 4 s') > 20"
  check "grader: nothing can be graded, in JSON" "0 no section 'nothing'" "$(./test.sh grade --json "$name-server:none" nothing 2>/dev/null | jq -r '"\(.score) \(.output | split(";")[0])"')"
  check "grader: nothing is left of its containers and networks" 0 "$(left_of_graders)"
}

# ---- AddressSanitizer under mixed load -------------------------------------------------------------------------------

readonly SANITIZE_SECONDS=120

build_sanitized() {
  local target
  target=$(rustc -vV | sed -n 's/^host: //p')
  binary=target/sanitize/$target/release/kv-store
  # (The toolchain has the sanitizer, but lets only unstable builds ask for it.)
  RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=line-tables-only \
    cargo build --release --locked --target "$target" --target-dir target/sanitize >"$work/build" 2>&1
}

# write_load: the clients, as a program for python3. It prints how often each kind of them was at work.
write_load() {
  cat >"$work/load.py" <<'END'
"""usage: load.py SECONDS HOST:PORT...: several clients of each kind at a time, each time on an instance at random."""
import concurrent.futures, random, socket, struct, sys, threading, time

end, instances = time.monotonic() + float(sys.argv[1]), [address.split(":") for address in sys.argv[2:]]
BIG, CHUNK = 1 << 20, 1 << 16

def connect():
    host, port = random.choice(instances)
    return socket.create_connection((host, int(port)), 3)

def reset(client):  # To close it sends a reset then.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

def key():
    return f"k{random.randrange(500)}"

def get(key, more=""):
    return f"GET /kv-store/{key} HTTP/1.1\r\nHost: t\r\n{more}\r\n".encode()

def put(key, size, length=None):
    return f"PUT /kv-store/{key} HTTP/1.1\r\nHost: t\r\nContent-Length: {length or size + 4}\r\n\r\nval=".encode() + b"v" * size

def read_all(client):
    try:
        while client.recv(CHUNK):
            pass
    except OSError:
        pass

def short_connections():
    for _ in range(20):
        with connect() as client:
            client.sendall(get(key(), "Connection: close\r\n"))
            read_all(client)

def half_closed():
    with connect() as client:
        client.sendall(put(key(), random.randrange(300)) * 3 + get(key()))
        client.shutdown(socket.SHUT_WR)
        read_all(client)

def resets():  # In the midst of requests and answers.
    for _ in range(20):
        with connect() as client:
            data = get(key()) * random.randrange(1, 40) + put(key(), 2000) + get("big") * random.randrange(3)
            client.sendall(data[: random.randrange(len(data))])
            if random.random() < 0.5:
                client.recv(random.choice([1, 100, CHUNK]))
            reset(client)

def pipelines():  # As much as goes, for a moment. Not all read the answers.
    with connect() as client:
        reader = threading.Thread(target=read_all, args=[client], daemon=True)
        if random.random() < 0.8:
            reader.start()
        until = time.monotonic() + random.random() * 0.3
        while time.monotonic() < until:
            client.sendall(b"".join(random.choice([get(key()), put(key(), 50)]) for _ in range(100)))
        client.shutdown(socket.SHUT_RDWR)

def large_answers():  # Read in part.
    with connect() as client:
        client.sendall(get("big") * 8)
        for _ in range(random.randrange(50)):
            client.recv(CHUNK)
        if random.random() < 0.5:
            reset(client)

def half_sent():  # Bodies that end early.
    with connect() as client:
        client.sendall(put(key(), random.randrange(BIG // 2), BIG))
        time.sleep(random.random() * 0.2)
        if random.random() < 0.5:
            reset(client)

def whole():  # Bodies that come whole, and then what is no request.
    with connect() as client:
        client.sendall(put("big", BIG - 10))
        client.recv(CHUNK)
        client.sendall(random.choice([b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]))
        client.recv(CHUNK)

def streams():  # That bring nonsense, or nothing.
    head = f"/kv-store?stream={random.random()} HTTP/1.1\r\nHost: t\r\nContent-Type: application/x-kv-store-stream\r\n"
    with connect() as answers, connect() as questions:
        answers.sendall(f"GET {head}\r\n".encode())
        answers.recv(CHUNK)
        questions.sendall(f"POST {head}Content-Length: 99999\r\n\r\n".encode() + random.randbytes(random.randrange(200)))
        if random.random() < 0.5:
            reset(random.choice([answers, questions]))
        answers.recv(CHUNK)

def keep_alive():
    with connect() as client:
        for _ in range(100):
            client.sendall(random.choice([get(key()), put(key(), 1), get(key()).replace(b"GET", b"DELETE")]))
            client.recv(CHUNK)

def lingering():  # More comes on connections that the server closes.
    for _ in range(20):
        with connect() as client:
            client.sendall(get(key(), "Connection: close\r\n") + b"x" * random.randrange(2000))
            client.recv(CHUNK)
            if random.random() < 0.5:
                client.sendall(b"x" * random.randrange(CHUNK))

def repeat(kind):
    count = 0
    while time.monotonic() < end:
        try:
            kind()
            count += 1
        except OSError:  # The instance was killed, or has closed the connection.
            pass
    return count

if __name__ == "__main__":
    kinds = [half_closed, pipelines, large_answers, whole, keep_alive] + 3 * [short_connections, resets, half_sent, lingering, streams]
    with concurrent.futures.ProcessPoolExecutor(len(kinds)) as clients:
        for kind, count in zip(kinds, clients.map(repeat, kinds)):
            print(kind.__name__, count)
END
}

# ended_of INSTANCE...: prints which of these have ended.
ended_of() {
  local instance
  for instance in "$@"; do kill -0 "${process[$instance]}" 2>/dev/null || echo "$instance"; done
}

# change_views_until_ended PID: as long as a process lives, the store grows and shrinks, its factor changes, and one node is
# killed and started again. Ends early if an instance does.
change_views_until_ended() {
  local round=0
  while kill -0 "$1" 2>/dev/null && [ -z "$(ended_of main follower n1 n2 n3)" ]; do
    case $((round++ % 4)) in
      0) change_to n1 n1 n2 >/dev/null ;;
      1) change n1 "{\"view\":\"$(view n1 n2 n3)\",\"repl-factor\":$((round % 8 > 4 ? 3 : 1))}" >/dev/null ;;
      2) kill_local n3 && restart n3 ;;
      3) change n1 "{\"view\":\"$(view n1 n2)\",\"repl-factor\":1,\"force\":true}" >/dev/null ;;
    esac
    sleep 2
  done
}

sanitize() {
  local began load kind count
  check "sanitize: the program is built with it" 1 "$(grep -c -m 1 __asan_init "$binary")"
  # It says what it finds in files, since the instances have taken stderr for themselves.
  export ASAN_OPTIONS=log_path=$work/asan:detect_leaks=0
  write_load
  start main && start follower FORWARDING_ADDRESS="${address[main]}" || exit 1
  for instance in n1 n2 n3; do address_local "$instance"; done
  for instance in n1 n2 n3; do start_node "$instance" VIEW="$(view n1 n2 n3)" || exit 1; done
  began=$(now)
  # (In a process group of its own, to be ended as a whole.)
  setsid python3 "$work/load.py" "$SANITIZE_SECONDS" "${address[@]}" >"$work/load" &
  load=$!
  change_views_until_ended "$load"
  [ -z "$(ended_of main follower n1 n2 n3)" ] || kill -- "-$load"
  check "sanitize: all instances live after $SANITIZE_SECONDS s" "" "$(ended_of main follower n1 n2 n3 | sed "s/$/ ended after $((($(now) - began) / 1000)) s/")"
  wait "$load"
  check "sanitize: the load ran to its end" "0, 20 clients" "$?, $(wc -l <"$work/load") clients"
  while read -r kind count; do check_that "sanitize: clients were at work: $kind" "$count > 0"; done <"$work/load"
  for instance in main follower n1 n2 n3; do check "sanitize: $instance answers" 200 "$(status_of "$instance" GET /kv-store)"; done
  check "sanitize: nothing was found" "" "$(grep -h -A 12 'ERROR: AddressSanitizer' "$work"/asan.*)"
}

# ---- The run ---------------------------------------------------------------------------------------------------------

mode=${1:-}
[ -n "$mode" ] || { docker info >/dev/null 2>&1 && mode=docker || mode=local; }
task=tests
case $mode in
  local | docker) ;;
  bench) mode=local task=bench ;;
  sanitize) mode=local task=sanitize ;;
  grade) task=grade name=kv-grade-$$-$RANDOM && read_grade_options "${@:2}" ;;
  --help | -h | help) usage && exit ;;
  *)
    usage
    exit 2
    ;;
esac
work=$(mktemp -d)
trap clean EXIT
trap 'exit 130' INT TERM HUP

if [ "$task" = grade ]; then
  grade
  exit
fi
[ "$task" != bench ] || need_wrk
case $task in sanitize) build_sanitized ;; *) "build_$mode" ;; esac || { cat "$work/build" && echo "test.sh: the build failed" && exit 1; }
if [ "$mode" = docker ]; then docker network create "$name" >/dev/null || exit 1; fi
if [ "$task" = bench ]; then
  bench
  exit
elif [ "$task" = sanitize ]; then
  sanitize
  tell_total
  exit
fi
clients=()
start main && start follower FORWARDING_ADDRESS="${address[main]}" && start second FORWARDING_ADDRESS="${address[follower]}" || exit 1
open_idle_clients main
test_instances
for instance in main follower; do
  test_form_vocabulary "$instance"
  test_json_vocabulary "$instance"
  test_json_values "$instance"
  test_encodings "$instance"
  test_keys "$instance"
  test_limits "$instance"
  test_http "$instance"
  test_pipelines "$instance"
  test_endless_head "$instance"
done
test_follower_is_no_different
test_metrics
test_endless_pipelines main
test_clients_that_leave main
test_large_answers
test_unread_answers
test_unread_streams
test_resting_clients
test_main_paused
[ "$mode" = local ] && test_streams_that_leave_local
test_settings
test_idle_clients main
test_main_gone
test_ring
test_follower_killed
test_concurrent_clients
test_nodes
test_refused_view_changes
test_messages
test_secret
test_few_keys
before_writers=$(total n1 n2 n3 n4)
test_writers_during_changes
test_node_paused_and_killed
test_stale_nodes
test_nodes_that_start_again
test_rival_changes
test_dead_addresses
test_blank_node_joins_one
test_first_views_that_differ
test_force_by_a_blank_node
test_causal_contexts
test_empty_store
test_shards_of_several
test_replicas_killed
test_replica_paused
[ "$mode" = docker ] && test_cut_network_docker
[ "$mode" = local ] && test_port_in_use_local && test_few_files_local && test_unread_stderr_local
[ "$mode" = docker ] && test_image_docker
[ "$mode" = docker ] && test_grader_docker
tell_total

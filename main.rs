//! kv-store: a distributed key-value store over HTTP, in one file.
//!
//! Whatever the role of an instance, a request travels one road:
//!
//! ```text
//! bytes -> Request -> route -> who owns it? -- this instance -> store -> Outcome -> Answer -> bytes
//!                                         \--- a peer -> relay -> the peer's Answer, unchanged --/
//! ```
//!
//! A main instance has every key; a follower has none and relays to its main instance; a node has the keys that its table gives
//! it, as far as it has fetched them. An `Outcome` (created, found, missing, refused because ...) knows nothing of HTTP; the
//! contract's two vocabularies are two columns of one table, `Outcome::row`. The sections below follow the road:
//!
//! - *Settings*: what the environment says. *Requests*: heads, routing, keys and values, all that is taken from a client.
//!   *Outcomes*: every answer's text.
//! - *Records*: keys and values, in buckets. *Owners*: who answers a request, and what this instance does if it has the key.
//! - *Tables*: which shard has which key. *The node*: what it knows and decides. *What a node does* over time: answering for a key,
//!   replicating, comparing, fetching, meeting others, starting, changing the view. *The node in the world*: its lock and its clock.
//! - *Streams*, and their two ends: *the relay*, the only place that asks other instances, and the end that is asked.
//! - *Connections* and *the socket*: where bytes come from and go to, and what the server cannot do. *The start*: `main`.
//!
//! In a store with one replica of each shard, a key is answered for by the one node that has it, until that one hands it on. Where
//! that is decided is `Node::place`; where a key changes hands is `Node::adopt` (who gives stops answering), `fetch` (who gets
//! asks for it) and `Node::arrived` (who gets begins to answer).
//!
//! With REPL_FACTOR a shard lives on several nodes, and each of these answers. A write goes to the others before it is acknowledged
//! (`replicate`), a node that started again fetches its shard, and whatever else replicas lack they find out when they meet
//! (`compare`). What some replica may lack is kept in an `Agreement`, and told to clients as their causal context.
//!
//! The library `may` runs each connection as a coroutine, and each stream. All coroutines share one worker thread (`start_worker` says
//! why), so none may block it or compute for long; one that waits for an answer holds nothing up. What blocks or takes long has a
//! thread: the HTTP client while it opens a stream, or sends a request to a main instance that takes none; looking a name up; looking
//! for a silent peer; and in a node meeting others, fetching, and comparing. Large bodies and the messages of nodes are dealt with by
//! two threads in the background (`in_background`). What is repeated has one thread each: watching connections, watching peers,
//! waking sleepers, giving memory back, keeping in touch with other nodes.
//!
//! "The contract" in the comments is the section of this name in README.md, which says all that a client may see.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem::ManuallyDrop;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Bound::{Excluded, Unbounded};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::process::exit;
use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak, mpsc};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use attohttpc::header::HeaderValue;
use attohttpc::{ErrorKind, Method, ProxySettings, RequestBuilder, StatusCode};
use hashbrown::hash_table::{Entry, HashTable};
use httpdate::HttpDate;
use may::io::WaitIo;
use may::sync::Blocker;
use may_minihttp::{BodyReader, HttpService, HttpServiceFactory, Request as Parsed, Response};
use percent_encoding::percent_decode;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use serde_json::value::RawValue;
use siphasher::sip::SipHasher24;
use siphasher::sip128;
use subtle::ConstantTimeEq;
use triomphe::ThinArc;
use url::{Position as Part, Url};

use node::*;
use protocol::*;
use records::*;
use relay::{ANSWER_LIMIT, PATIENCE, Peer, Question, in_background};
use streams::*;
use table::*;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The limit of a value, in bytes: of a string its UTF-8, of anything else its JSON text (the contract, "Size limit").
const MAX_VALUE: usize = 1 << 20;
/// The limit of a body, in bytes (the contract, "Size limit").
/// (All bodies together have no limit but that of the number of connections.)
const MAX_BODY: usize = 4 << 20;
/// The limit of a request's head. The server has none of its own and would collect an endless head in memory.
const MAX_HEAD: usize = 64 << 10;
/// The answers on a stream that are not read, in bytes: more is answered there only when there are fewer.
const MAX_UNSENT: u64 = 4 << 20;
/// The answers of a connection that may wait to be sent in one go, in bytes.
const BATCH: usize = 32 << 10;
/// The answers that all connections together may have waiting for clients that do not read, in bytes.
const MAX_UNREAD: u64 = 64 << 20;
/// Above this, a large answer that another instance gave (it was asked when there were fewer) ends its connection, and a stream with
/// more than MAX_UNSENT ends.
const MAX_UNREAD_EVER: u64 = 2 * MAX_UNREAD;
/// How long a client must have read nothing to be closed for that. A reader on a lossy link waits for a packet to be sent again for a
/// few tenths of a second, and so does one on a busy machine for its turn.
const STUCK: Duration = Duration::from_secs(1);
/// How many bytes of answers a client that sends one request after the other gets before others have their turn.
const TURN: u64 = 64 << 10;
/// How many bytes of a body are read before that.
const BODY_TURN: u64 = 512 << 10;
/// A connection on which nothing happens for this long is closed. Load balancers do so after 60 s: the client's side should be
/// the first, or a request may meet a connection that is just being closed.
const IDLE_LIMIT: Duration = Duration::from_secs(75);

/// Locks a mutex, also after a panic elsewhere: what is guarded here is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Collects into a set. (`collect` would sort first, which is several kB of code for each type.)
fn set_of<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeSet<T> {
    let mut set = BTreeSet::new();
    set.extend(items);
    set
}

/// The indices of some numbers, in the order of the numbers; of equals, the first comes first. (One sort for all who need one,
/// for the same reason.)
fn in_order(numbers: impl Iterator<Item = u64>) -> Vec<usize> {
    let mut numbers: Vec<(u64, usize)> = numbers.zip(0..).collect();
    numbers.sort_unstable();
    numbers.into_iter().map(|(_, index)| index).collect()
}

/// Who sleeps, by when they wake; the number tells apart those that wake at once.
static SLEEPERS: Mutex<BTreeMap<(Instant, usize), Arc<Blocker>>> = Mutex::new(BTreeMap::new());
static SLEEPER_CAME: Condvar = Condvar::new();

/// Lets a coroutine, or a thread, sleep. (`may::coroutine::sleep` sets a timer and then writes to the coroutine once more: if it has
/// woken and ended by then, it is gone, and the process crashes.)
fn pause(time: Duration) {
    let sleeper = Arc::new(Blocker::new(false));
    let wakes = (Instant::now() + time, Arc::as_ptr(&sleeper) as usize);
    let mut sleepers = lock(&SLEEPERS);
    sleepers.insert(wakes, sleeper.clone());
    let is_first = sleepers.keys().next() == Some(&wakes);
    drop(sleepers);
    if is_first {
        SLEEPER_CAME.notify_one();
    }
    let _ = sleeper.park(None);
}

/// Wakes the coroutines whose time has come, or waits for one. To be repeated by a thread of its own.
fn wake_sleepers() {
    let mut sleepers = lock(&SLEEPERS);
    let now = Instant::now();
    let later = sleepers.split_off(&(now, usize::MAX));
    let due = std::mem::replace(&mut *sleepers, later);
    if due.is_empty() {
        let next = sleepers.keys().next().map(|(due, _)| due.saturating_duration_since(now));
        drop(SLEEPER_CAME.wait_timeout(sleepers, next.unwrap_or(Duration::from_secs(3600))));
    } else {
        // Without the lock (`Waiting`).
        drop(sleepers);
        due.values().for_each(|sleeper| sleeper.unpark());
    }
}

/// A number that nobody guesses: the standard library keys its hashes with such.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}

// ---- Settings: what the environment says ----------------------------------------------------------------------------

const HELP: &str = "\
kv-store: a distributed key-value store over HTTP

usage: kv-store [--help | --version | --health]
  --health  asks the instance that the same environment describes whether it answers, a node for keys; exit status 0 or 1

environment (an empty variable is an unset one):
  PORT                TCP port to listen on                        [the port of ADDRESS, else 8080]
  IP                  IPv4 or IPv6 address to bind                 [0.0.0.0]
  FORWARDING_ADDRESS  host:port of the main instance to relay to   [none: this is a main instance]
  MAINIP              the same, where FORWARDING_ADDRESS is unset
  ADDRESS             this node's own host:port, as others reach it   [none]
  VIEW                the nodes of the store, host:port,host:port,... [ADDRESS alone if that is set]
  REPL_FACTOR         how many nodes hold each shard, at least [1]
  SECRET              what the nodes of a store share: 1 to 200 visible ASCII characters [none]
";

/// What the environment asks of this process.
struct Settings {
    listen: SocketAddr,
    role: Role,
    /// The first view of a node, and how many nodes hold each shard then.
    view: Vec<String>,
    factor: usize,
    /// What the nodes of the store share.
    secret: Option<String>,
}

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    Settings::read(variable).unwrap_or_else(|line| fail(2, &line))
});

impl Settings {
    /// Reads the variables through `variable`. The error is a line for stderr: variable, value, what was expected.
    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Settings, String> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let address = |name: &str| match get(name) {
            Some(value) if port_of(&value).is_none() => {
                Err(format!("{name}={value}: expected host:port, such as 10.10.0.2:8080 or main:8080"))
            }
            value => Ok(value),
        };
        let own = address("ADDRESS")?;
        let port = match (get("PORT"), &own) {
            (Some(port), _) => port_of(&format!("localhost:{port}"))
                .ok_or(format!("PORT={port}: expected a number from 1 to 65535"))?,
            (None, Some(own)) => port_of(own).unwrap_or_default(),
            (None, None) => 8080,
        };
        let ip = get("IP").unwrap_or("0.0.0.0".into());
        let ip: IpAddr = ip.parse().map_err(|_| format!("IP={ip}: expected an IPv4 or IPv6 address"))?;
        let main = address("FORWARDING_ADDRESS")?.map_or_else(|| address("MAINIP"), |main| Ok(Some(main)))?;
        let text = get("VIEW").unwrap_or_default();
        let view = match (&own, &main) {
            _ if text.is_empty() => Ok(own.iter().cloned().collect()),
            (None, _) => Err("ADDRESS to be set as well, this node's own host:port".into()),
            (_, Some(main)) => Err(format!("no FORWARDING_ADDRESS or MAINIP beside it, but one is {main}")),
            _ => parse_view(text.split(',')).map_err(|why| format!("host:port,host:port,..., but {why}")),
        };
        let view = view.map_err(|expected| format!("VIEW={text}: expected {expected}"))?;
        let needs_address = |setting: String| match &own {
            Some(_) => Ok(()),
            None => Err(format!("{setting}: expected ADDRESS to be set as well, this node's own host:port")),
        };
        let mut factor = 1;
        if let Some(text) = get("REPL_FACTOR") {
            needs_address(format!("REPL_FACTOR={text}"))?;
            let parsed = parse_factor(&text, view.len());
            factor = parsed.map_err(|expected| format!("REPL_FACTOR={text}: expected {expected}"))?;
        }
        let secret = get("SECRET");
        if let Some(text) = &secret {
            needs_address("SECRET=...".into())?;
            if !(1..=200).contains(&text.len()) || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err("SECRET=...: expected 1 to 200 visible ASCII characters (its value is not shown)".into());
            }
        }
        let role = main.map(Role::Follower).or(own.map(Role::Node)).unwrap_or(Role::Main);
        Ok(Settings { listen: SocketAddr::new(ip, port), role, view, factor, secret })
    }
}

/// Checks the addresses of a view. The error says what is wrong with which.
fn parse_view<'a>(addresses: impl Iterator<Item = &'a str>) -> Result<Vec<String>, String> {
    let view: Vec<String> = addresses.take(1001).map(str::to_owned).collect();
    for (index, address) in view.iter().enumerate() {
        if port_of(address).is_none() {
            return Err(format!("{address:?} is not host:port"));
        } else if view[..index].contains(address) {
            return Err(format!("{address} is given twice"));
        }
    }
    if (1..=1000).contains(&view.len()) { Ok(view) } else { Err("it must name 1 to 1000 nodes".into()) }
}

/// Reads a replication factor for a number of nodes. The error says what was expected.
fn parse_factor(text: &str, nodes: usize) -> Result<usize, String> {
    let factor = text.parse().ok().filter(|factor| (1..=nodes).contains(factor) && !text.starts_with('+'));
    factor.ok_or(format!("a whole number from 1 to {nodes}, the number of nodes"))
}

/// Whether a text has only what an address has: the URL parser takes more characters, such as a quotation mark, than may stand
/// in an answer.
fn is_plain(text: &str) -> bool {
    text.len() <= 300 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte))
}

/// The port of `host:port`, where the host is a name, an IPv4 address or an IPv6 address in brackets: what stands unchanged
/// in a URL, and nothing else.
fn port_of(text: &str) -> Option<u16> {
    let url = Url::parse(&format!("http://{text}")).ok()?;
    let (host, port) = (url.host_str()?, url.port_or_known_default().filter(|port| *port > 0)?);
    (is_plain(text) && text.eq_ignore_ascii_case(&format!("{host}:{port}"))).then_some(port)
}

// ---- Requests: what a client asks for -------------------------------------------------------------------------------

/// A whole request. HEAD is a GET here: only the connection knows that its answer leaves without the body.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Request {
    verb: String,
    /// Path and query as they came, percent-encoded.
    target: String,
    content_type: String,
    /// The instances that relayed this request so far (RFC 9110 section 7.6.3).
    via: String,
    origin: Origin,
    #[serde(with = "serde_bytes")]
    body: Vec<u8>,
    /// The body is too large to be read.
    #[serde(skip)]
    oversized: bool,
}

/// What a request is between instances, where it travels on a stream.
#[derive(Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
enum Origin {
    /// A client's request, relayed or not.
    #[default]
    Client,
    /// A client's request that a node sends to the one that owns the key by its table, which is of this store: the owner may
    /// have started again since, and be a store of its own.
    Node(u64),
    /// No client's request: the body is what one node says to another (`Envelope`), or has it store (`Push`).
    Message,
    Push,
}

/// What the head of a request tells the connection.
struct Framing {
    /// The length of the body, in bytes.
    length: usize,
    is_head: bool,
    /// The client wants the connection closed, or speaks HTTP/1.0.
    closing: bool,
    expects_continue: bool,
}

/// Reads the head of a request that the server took apart; the body is still missing. The error is the refusal of a request
/// whose body's length cannot be trusted: where the next request begins is not known, so the connection must be closed.
fn read_head(parsed: &Parsed) -> Result<(Request, Framing), Outcome> {
    let (verb, target, headers) = (parsed.method(), parsed.path(), parsed.headers());
    let all = |name: &'static str| headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
    let join = |list: String, next: String| if list.is_empty() { next } else { list + ", " + &next };
    let joined = |name| all(name).map(|it| String::from_utf8_lossy(it.value).into_owned()).fold(String::new(), join);
    if all("Transfer-Encoding").next().is_some() {
        return Err(Outcome::LengthRequired);
    }
    let size: usize = headers.iter().map(|header| header.name.len() + header.value.len()).sum();
    // Digits only (RFC 9110 section 8.6); Rust's own parser would take a sign as well.
    let digits = |value| std::str::from_utf8(value).ok().filter(|text| !text.starts_with('+'));
    let mut lengths = all("Content-Length").map(|header| digits(header.value)?.parse().ok());
    let length = lengths.next().unwrap_or(Some(0)).ok_or(Outcome::BadRequest)?;
    // One host, or none in HTTP/1.0 (RFC 9112 section 3.2).
    let mut hosts = all("Host");
    let has_host = hosts.next().map_or(parsed.version() == 0, |host| is_host(host.value)) && hosts.next().is_none();
    let fits = size + target.len() <= MAX_HEAD;
    if !has_host || !fits || lengths.any(|another| another != Some(length)) {
        return Err(Outcome::BadRequest);
    }
    let connection = joined("Connection").to_ascii_lowercase();
    let framing = Framing {
        length,
        is_head: verb == "HEAD",
        closing: parsed.version() == 0 || connection.split(',').any(|option| option.trim() == "close"),
        expects_continue: parsed.version() == 1 && length > 0 && joined("Expect").eq_ignore_ascii_case("100-continue"),
    };
    let target = origin_form(target).ok_or(Outcome::BadRequest)?;
    let (verb, target) = (if framing.is_head { "GET" } else { verb }.into(), target.into_owned());
    let (content_type, via) = (joined("Content-Type"), joined("Via"));
    let request = Request { verb, target, content_type, via, ..Request::default() };
    let oversized = length > MAX_BODY && request.is_upload();
    Ok((Request { oversized, ..request }, framing))
}

/// The path and query of a target. In absolute form, scheme and host stand before them (RFC 9112 section 3.2.2); None is a host
/// that is none. Whatever else does not begin with a slash (OPTIONS *, CONNECT host:port) is a path that does not exist.
fn origin_form(target: &str) -> Option<Cow<'_, str>> {
    let scheme = |text: &&str| text.eq_ignore_ascii_case("http://") || text.eq_ignore_ascii_case("https://");
    let length = [7, 8].into_iter().find(|length| target.get(..*length).as_ref().is_some_and(scheme));
    let Some(length) = length else { return Some(target.into()) };
    let rest = &target[length..];
    let (host, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if host.is_empty() || !is_host(host.as_bytes()) {
        None
    } else if path.starts_with('/') {
        Some(path.into())
    } else {
        Some(format!("/{path}").into())
    }
}

/// Whether this is `host` or `host:port` as a request may name it (RFC 3986 section 3.2.2), or nothing, which it may too.
fn is_host(text: &[u8]) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let split = text.iter().rposition(|byte| *byte == b':').filter(|at| text[at + 1..].iter().all(is_digit));
    let name = &text[..split.unwrap_or(text.len())];
    let literal = name.strip_prefix(b"[").and_then(|name| name.strip_suffix(b"]"));
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(byte);
    match literal {
        Some(address) => address.iter().all(|byte| is_plain(byte) || *byte == b':'),
        None => name.iter().all(is_plain),
    }
}

#[derive(Clone, Copy)]
enum Vocabulary {
    Form,
    Json,
}

/// What a path names.
enum Resource<'a> {
    Instance,
    Metrics,
    KeyCount,
    ViewChange,
    /// All shards, or one by its index.
    Shards(Option<usize>),
    Key(Cow<'a, [u8]>),
    Unknown,
}

impl Request {
    /// Finds what the request is about, and in which words its answer is due: the whole routing.
    fn route(&self) -> (Resource<'_>, Vocabulary) {
        let media_type = self.content_type.split(';').next().unwrap_or_default().trim();
        let is_json = media_type.eq_ignore_ascii_case("application/json");
        let typed = if is_json { Vocabulary::Json } else { Vocabulary::Form };
        let path = self.target.as_bytes().split(|byte| *byte == b'?').next().unwrap_or_default();
        // A key is one path segment; a slash inside a key arrives as %2F.
        let key = |segment| Resource::Key(percent_decode(segment).into());
        let mut segments = path.split(|byte| *byte == b'/');
        match [(); 5].map(|()| segments.next()) {
            [Some(b""), Some(b"metrics"), None, ..] => (Resource::Metrics, typed),
            [Some(b""), Some(b"kv-store"), None | Some(b""), None, _] => (Resource::Instance, Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(b"key-count"), None, _] => (Resource::KeyCount, Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(b"view-change"), None, _] => (Resource::ViewChange, Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(b"shards"), None, _] => (Resource::Shards(None), Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(b"shards"), Some(id), None] => {
                (Resource::Shards(Some(shard_index(id))), Vocabulary::Json)
            }
            [Some(b""), Some(b"kv-store"), Some(b"keys"), Some(segment), None] => (key(segment), Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(segment), None, _] => (key(segment), typed),
            _ => (Resource::Unknown, typed),
        }
    }

    /// Whether this opens a stream.
    fn is_stream(&self) -> bool {
        self.verb == "POST" && self.content_type == STREAM
    }

    fn is_upload(&self) -> bool {
        matches!(self.verb.as_str(), "PUT" | "POST")
    }

    /// Whether a body of this length can matter. (In the JSON vocabulary that of a GET may have a causal context.)
    fn wants_body(&self, length: usize) -> bool {
        self.is_upload() || length <= MAX_BODY && matches!(self.route(), (Resource::Key(_), Vocabulary::Json))
    }
}

/// The index of a shard by its id, which counts from 1; one that no shard has for what is no id.
fn shard_index(id: &[u8]) -> usize {
    let number =
        str::from_utf8(id).ok().filter(|text| !text.starts_with(['0', '+'])).and_then(|text| text.parse().ok());
    number.map_or(usize::MAX, |number: usize| number - 1)
}

/// Whether a key may be stored. Any key may be asked for: one that cannot exist does not exist.
fn is_valid_key(key: &[u8], vocabulary: Vocabulary) -> bool {
    let is_form_byte = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    match vocabulary {
        Vocabulary::Form => (1..=200).contains(&key.len()) && key.iter().all(is_form_byte),
        Vocabulary::Json => std::str::from_utf8(key).is_ok_and(|key| (1..=50).contains(&key.chars().count())),
    }
}

/// The record that a PUT wants stored, or why it is refused. The checks run in the contract's order: key, value, size.
fn record_of(key: &[u8], request: &Request, vocabulary: Vocabulary) -> Result<Record, Outcome> {
    if !is_valid_key(key, vocabulary) {
        return Err(Outcome::KeyInvalid);
    } else if request.oversized {
        return Err(Outcome::ValueTooLarge);
    }
    let value = match vocabulary {
        Vocabulary::Form => json_of(&form_value(request)?)?,
        Vocabulary::Json => json_value(&request.body)?,
    };
    Ok(Record::new(key, &value))
}

/// The first field `val` of the body, or else of the query, decoded.
fn form_value(request: &Request) -> Result<String, Outcome> {
    let query = request.target.split_once('?').map_or("", |(_, query)| query).as_bytes();
    let value = form_field(&request.body).or_else(|| form_field(query)).ok_or(Outcome::ValueMissing)?;
    String::from_utf8(value).map_err(|_| Outcome::ValueNotText)
}

/// Finds the field `val` of an application/x-www-form-urlencoded text. The `form_urlencoded` crate would replace bytes that
/// are not UTF-8 instead of telling.
fn form_field(text: &[u8]) -> Option<Vec<u8>> {
    let spaced = |part: &[u8]| part.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect::<Vec<u8>>();
    let decode = |part| match spaced(part) {
        plain if !plain.contains(&b'%') => plain,
        encoded => percent_decode(&encoded).collect(),
    };
    text.split(|byte| *byte == b'&').find_map(|field| {
        let (name, value) = field.split_at(field.iter().position(|byte| *byte == b'=').unwrap_or(field.len()));
        (name == b"val" || decode(name) == b"val").then(|| decode(value.get(1..).unwrap_or_default()))
    })
}

/// The member `value` of a JSON object, as the JSON text it came as, so that it goes back digit for digit; only a string is
/// written anew, as short as can be. Nothing here recurses, however deep the value is nested.
fn json_value(body: &[u8]) -> Result<String, Outcome> {
    let not_text = |refusal| if is_value_broken(body) { Outcome::ValueNotText } else { refusal };
    match member(body, "value").map_err(not_text)? {
        "null" => Err(Outcome::ValueMissing),
        json if json.starts_with('"') => {
            // JSON can spell half of a surrogate pair (RFC 8259 section 8.2), which is no text.
            json_of(&serde_json::from_str::<String>(json).map_err(|_| Outcome::ValueNotText)?)
        }
        json if json.len() > MAX_VALUE => Err(Outcome::ValueTooLarge),
        json => Ok(json.to_owned()),
    }
}

/// Whether a body was refused since its value is a string with bytes that are no UTF-8: replaced, they are no fault any more.
fn is_value_broken(body: &[u8]) -> bool {
    let mended = String::from_utf8_lossy(body);
    member(mended.as_bytes(), "value").is_ok_and(|value| value.starts_with('"') && value.contains('\u{fffd}'))
}

/// A text as a JSON string. The limit is that of the text: escapes make up to six bytes of one.
fn json_of(text: &str) -> Result<String, Outcome> {
    // Writing to a String cannot fail.
    if text.len() > MAX_VALUE {
        Err(Outcome::ValueTooLarge)
    } else {
        Ok(serde_json::to_string(text).unwrap_or_default())
    }
}

/// The JSON text of a member of the JSON object that a body is: `null` if there is no such member, or no body. Of members with
/// the same name the last one counts. The others are passed over, so that a million of them take no memory.
fn member<'a>(body: &'a [u8], name: &str) -> Result<&'a str, Outcome> {
    Ok(find_member(body, name)?.unwrap_or("null"))
}

fn find_member<'a>(body: &'a [u8], name: &str) -> Result<Option<&'a str>, Outcome> {
    // JSON is UTF-8 (RFC 8259 section 8.1), also where the parser passes over it.
    let body = str::from_utf8(if body.is_empty() { b"{}" } else { body }).map_err(|_| Outcome::BodyNotObject)?;
    let mut parser = serde_json::Deserializer::from_str(body);
    let value = parser.deserialize_map(Member(name)).map_err(|_| Outcome::BodyNotObject)?;
    parser.end().map_err(|_| Outcome::BodyNotObject)?;
    Ok(value.map(RawValue::get))
}

/// What a client has seen, as far as some replica may lack it: keys and the stamps of their records. To a client it means
/// nothing.
type Causal = BTreeMap<String, u64>;

/// The causal context in the body of a request in the JSON vocabulary. None if there is none; an error if it is not ours. (A body
/// that is no JSON object is none of this function's business: a GET may have any.)
fn causal_context(request: &Request, vocabulary: Vocabulary) -> Result<Option<Causal>, Outcome> {
    if matches!(vocabulary, Vocabulary::Form) || request.oversized || request.body.is_empty() {
        return Ok(None);
    }
    // Hardly any request has one: it is not worth reading a large body twice.
    let may_have_it = |text: &str| text.contains("causal-context") || text.contains("\\u");
    if !str::from_utf8(&request.body).is_ok_and(may_have_it) {
        return Ok(None);
    }
    let Ok(Some(text)) = find_member(&request.body, "causal-context") else { return Ok(None) };
    let mut parser = serde_json::Deserializer::from_str(text);
    parser.deserialize_map(Stamps).map(Some).map_err(|_| Outcome::ContextInvalid)
}

/// Reads the members of a causal context: stamps in hexadecimal, since JSON's numbers are not exact everywhere.
struct Stamps;

impl<'a> Visitor<'a> for Stamps {
    type Value = Causal;

    fn expecting(&self, out: &mut Formatter) -> fmt::Result {
        out.write_str("a causal context")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut members: M) -> Result<Causal, M::Error> {
        let mut context = Causal::new();
        while let Some((key, text)) = members.next_entry::<String, String>()? {
            let stamp = u64::from_str_radix(&text, 16).ok().filter(|_| text.len() == 16);
            context.insert(key, stamp.ok_or_else(|| serde::de::Error::custom("no stamp"))?);
        }
        Ok(context)
    }
}

/// Looks for the member of this name.
struct Member<'n>(&'n str);

impl<'a> Visitor<'a> for Member<'_> {
    type Value = Option<&'a RawValue>;

    fn expecting(&self, out: &mut Formatter) -> fmt::Result {
        out.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut members: M) -> Result<Self::Value, M::Error> {
        let mut found = None;
        while let Some(name) = members.next_key::<&RawValue>()? {
            let name = name.get();
            let is_wanted = match name.contains('\\') {
                true => serde_json::from_str::<String>(name).is_ok_and(|name| name == self.0),
                false => name[1..name.len() - 1] == *self.0,
            };
            if is_wanted {
                found = Some(members.next_value()?);
            } else {
                members.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

// ---- Outcomes, and how the two vocabularies say them ----------------------------------------------------------------

/// What became of a request, before anyone thinks of HTTP.
#[rustfmt::skip]
enum Outcome {
    Created, Replaced, Found(Record), Deleted, Missing,
    KeyInvalid, ValueMissing, ValueTooLarge, ValueNotText, BodyNotObject,
    ContextInvalid, Unsatisfied,
    MainDown, NotFound, BadRequest, Unparsed, LengthRequired, AddressNotSet, ViewMissing, ChangeUnderWay, Elsewhere, NotOfStore,
    /// With the header that tells which verbs the path takes.
    VerbNotAllowed(&'static str),
    NoShard,
    /// With the members that tell how many keys there are, that describe this instance, or a shard, or with the shards' ids.
    KeyCount(String), Instance(String), Shard(String), Shards(String),
    /// With the text, but for its last line break.
    Metrics(String),
    /// With the address of the node.
    NodeDown(String), HoldsKeys(String),
    /// With the reason.
    ViewInvalid(String),
    /// With the members that tell how many keys moved, and where the keys are.
    ViewChanged(String),
}

impl Outcome {
    /// The answers of the contract: status and body in the form vocabulary, and in the JSON vocabulary; of an error, only
    /// what is wrong. `answer` fills in what stands in angle brackets. What only one vocabulary can say stands there twice.
    #[rustfmt::skip]
    fn row(&self) -> [(u16, &'static str); 2] {
        use Outcome::*;
        match self {
            Created   => [(201, r#"{"replaced":"False","msg":"New key created"}"#),
                          (201, r#"{"message":"Added successfully","replaced":false}"#)],
            Replaced  => [(200, r#"{"replaced":"True","msg":"Value of existing key replaced"}"#),
                          (200, r#"{"message":"Updated successfully","replaced":true}"#)],
            Found(_)  => [(200, r#"{"result":"Success","value":<value>}"#),
                          (200, r#"{"doesExist":true,"message":"Retrieved successfully","value":<value>}"#)],
            Deleted   => [(200, r#"{"result":"Success"}"#),
                          (200, r#"{"doesExist":true,"message":"Deleted successfully"}"#)],
            Missing   => [(404, "Key does not exist"),
                          (404, r#"{"doesExist":false,"error":"Key does not exist","message":"Error in <verb>"}"#)],
            KeyInvalid        => [(403, "Key not valid"),        (400, "Key is too long")],
            ValueMissing      => [(403, "No value provided"),    (400, "Value is missing")],
            ValueTooLarge     => [(403, "Object too large. Size limit is 1MB"), (413, "Value is too large")],
            ValueNotText      => [(403, "Value is not valid UTF-8"), (400, "Value is not valid UTF-8")],
            BodyNotObject     => [(400, "Body is not a JSON object"); 2],
            ContextInvalid    => [(400, "Causal context is not valid"); 2],
            Unsatisfied       => [(400, "Unable to satisfy request"); 2],
            MainDown          => [(501, "Server unavailable"),   (503, "Main instance is down")],
            NotFound          => [(404, "Not found"); 2],
            VerbNotAllowed(_) => [(405, "Method not allowed"); 2],
            BadRequest        => [(400, "Bad request"); 2],
            Unparsed          => [(400, "Bad request: not HTTP/1.1, or more than 16 headers"); 2],
            LengthRequired    => [(411, "Length required"); 2],
            KeyCount(_)       => [(200, r#"{"message":"Key count retrieved successfully",<count>}"#); 2],
            Shards(_)         => [(200, r#"{"message":"Shard membership retrieved successfully","shards":[<ids>]}"#); 2],
            Shard(_)          => [(200, r#"{"message":"Shard information retrieved successfully",<shard>}"#); 2],
            NoShard           => [(404, "Shard does not exist"); 2],
            Instance(_)       => [(200, r#"{"result":"Success",<instance>}"#); 2],
            Metrics(_)        => [(200, "<metrics>"); 2],
            AddressNotSet     => [(400, "ADDRESS is not set"); 2],
            NodeDown(_)       => [(501, "Server unavailable"),   (503, "Node <node> is down")],
            ViewMissing       => [(400, "View is missing"); 2],
            ViewInvalid(_)    => [(400, "View is not valid: <reason>"); 2],
            ChangeUnderWay    => [(409, "Another view change is in progress"); 2],
            // Between instances.
            NotOfStore        => [(403, "Not a node of this store"); 2],
            HoldsKeys(_)      => [(409, "Node <node> holds keys of another store"); 2],
            ViewChanged(_)    => [(200, r#"{"message":"View change successful",<shards>}"#); 2],
            // Only between nodes: the owner is another one by this node's table.
            Elsewhere         => [(421, "Not the owner"); 2],
        }
    }

    /// Says the outcome in a vocabulary.
    fn answer(&self, vocabulary: Vocabulary, verb: &str) -> Answer {
        let (status, text) = self.row()[vocabulary as usize];
        let template = match vocabulary {
            _ if text.starts_with(['{', '<']) => Cow::Borrowed(text),
            Vocabulary::Form => format!(r#"{{"result":"Error","msg":"{text}"}}"#).into(),
            Vocabulary::Json => format!(r#"{{"error":"{text}","message":"Error in <verb>"}}"#).into(),
        };
        let mut body = Vec::with_capacity(template.len() + 64);
        for part in template.split_inclusive('>') {
            let (text, blank) = part.split_once('<').unwrap_or((part, ""));
            body.extend(text.as_bytes());
            match (self, blank) {
                (_, "") => {}
                (_, "verb>") => body.extend(verb.as_bytes()),
                (Outcome::Found(record), _) => body.extend(record.value()),
                (Outcome::KeyCount(text) | Outcome::Shard(text) | Outcome::Shards(text), _)
                | (Outcome::Instance(text) | Outcome::NodeDown(text) | Outcome::HoldsKeys(text), _)
                | (Outcome::ViewInvalid(text) | Outcome::ViewChanged(text) | Outcome::Metrics(text), _) => {
                    body.extend(text.as_bytes());
                }
                _ => {}
            }
        }
        body.push(b'\n');
        let header = match self {
            Outcome::VerbNotAllowed(header) => header,
            Outcome::Metrics(_) => METRICS,
            _ => JSON,
        };
        Answer { status, header: Cow::Borrowed(header), body }
    }
}

/// The headers that our answers have, beside those that every answer has.
const JSON: &str = "Content-Type: application/json";
const METRICS: &str = "Content-Type: text/plain; version=0.0.4";
const CLOSE: &str = "Connection: close\r\n";
const GET_ONLY: &str = "Content-Type: application/json\r\nAllow: GET, HEAD";
const PUT_ONLY: &str = "Content-Type: application/json\r\nAllow: PUT";
const KEY_VERBS: &str = "Content-Type: application/json\r\nAllow: GET, HEAD, PUT, DELETE";

/// A status, `Content-Type` and perhaps `Allow`, and a body: what a relay passes on of an answer.
#[derive(Clone, Serialize, Deserialize)]
struct Answer {
    status: u16,
    header: Cow<'static, str>,
    #[serde(with = "serde_bytes")]
    body: Vec<u8>,
}

impl Answer {
    /// Writes the answer as HTTP. `connection` is what its head says of the connection, if anything.
    fn write(&self, out: &mut Vec<u8>, connection: &str, without_body: bool) {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_GATEWAY);
        let reason = status.canonical_reason().unwrap_or("Unknown");
        for text in ["HTTP/1.1 ", status.as_str(), " ", reason, "\r\nServer: M\r\nDate: "] {
            out.extend(text.as_bytes());
        }
        write_date(out);
        // Writing to a Vec cannot fail.
        let _ = write!(out, "\r\nContent-Length: {}\r\n", self.body.len());
        for text in [&self.header, "\r\n", connection, "\r\n"] {
            out.extend(text.as_bytes());
        }
        out.extend(if without_body { &[] } else { &self.body[..] });
    }

    /// About how many bytes it takes.
    fn size(&self) -> usize {
        self.body.len() + self.header.len() + 128
    }

    /// What instances say to one another, as bytes.
    fn message(content: &impl Serialize) -> Answer {
        // Writing to a Vec cannot fail.
        Answer { status: 200, header: "".into(), body: postcard::to_stdvec(content).unwrap_or_default() }
    }

    /// Adds which node answered, where there is a place for it.
    fn with_address(self, node: &str, vocabulary: Vocabulary) -> Answer {
        match vocabulary {
            Vocabulary::Json => self.with_member(&format!(r#""address":"{node}""#)),
            Vocabulary::Form => self,
        }
    }

    /// Adds the causal context, if the request had one.
    fn with_context(self, context: &Option<Causal>) -> Answer {
        let Some(context) = context else { return self };
        // Writing to a String cannot fail.
        let name = |key: &String| serde_json::to_string(key).unwrap_or_default();
        let stamps: Vec<String> =
            context.iter().map(|(key, stamp)| format!(r#"{}:"{stamp:016x}""#, name(key))).collect();
        self.with_member(&format!(r#""causal-context":{{{}}}"#, stamps.join(",")))
    }

    fn with_member(mut self, member: &str) -> Answer {
        if self.body.ends_with(b"}\n") {
            self.body.truncate(self.body.len() - 2);
            let _ = writeln!(self.body, ",{member}}}");
        }
        self
    }
}

thread_local! {
    /// The second that was last asked for, and how HTTP spells it.
    static DATE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
}

/// Writes the time of day, which each thread works out once a second.
fn write_date(out: &mut Vec<u8>) {
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    DATE.with_borrow_mut(|(of, date)| {
        if *of != second || date.is_empty() {
            (*of, *date) = (second, HttpDate::from(now).to_string());
        }
        out.extend(date.as_bytes());
    });
}

// ---- Records: keys and values, in buckets ---------------------------------------------------------------------------

mod records {
    //! Keys have an order: by hash, and where two have the same, by the key itself. The records stand in buckets, each for a
    //! stretch of hash values, so that whatever is done for many keys (counting, fetching, giving up) is done a bucket at a
    //! time: no hold of the lock grows with the store, and no big map ever has to double.

    use super::*;

    /// A place in the order of keys.
    pub type Position = (u64, Vec<u8>);

    /// After every key: 0xff is no byte of UTF-8.
    pub fn end_of_order() -> Position {
        (u64::MAX, vec![0xff])
    }

    /// The keys from one place up to, and without, another.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub struct Span {
        pub from: Position,
        pub to: Position,
    }

    impl Span {
        /// The whole order.
        pub fn all() -> Span {
            Span { from: Position::default(), to: end_of_order() }
        }

        pub fn overlaps(&self, other: &Span) -> bool {
            self.from < other.to && other.from < self.to
        }

        fn covers(&self, other: &Span) -> bool {
            self.from <= other.from && other.to <= self.to
        }

        pub fn contains(&self, (hash, key): (u64, &[u8])) -> bool {
            (self.from.0, &self.from.1[..]) <= (hash, key) && (hash, key) < (self.to.0, &self.to.1[..])
        }

        /// Cuts it at those of some hash values, which must rise, that lie within.
        pub fn cut_at(&self, hashes: impl Iterator<Item = u64>) -> Vec<Span> {
            let (mut parts, mut from) = (Vec::new(), self.from.clone());
            for place in hashes.map(|hash| (hash, Vec::new())) {
                if from < place && place < self.to {
                    parts.push(Span { from: std::mem::replace(&mut from, place.clone()), to: place });
                }
            }
            parts.push(Span { from, to: self.to.clone() });
            parts
        }
    }

    /// SipHash-2-4 with a key of zeros (Aumasson and Bernstein, 2012): the same in every build.
    pub fn hash_of(key: &[u8]) -> u64 {
        SipHasher24::new().hash(key)
    }

    /// A key and its value in one allocation: a stamp, a byte with the key's length, the key, and the value as JSON text, as it
    /// goes back. Cloning one copies a pointer, so that an answer is made of it after the lock on the store is gone.
    #[derive(Clone)]
    pub struct Record(ThinArc<u64, u8>);

    impl Record {
        /// The key must be valid, which keeps it to 200 bytes in either vocabulary. The stamp comes when it is stored.
        pub fn new(key: &[u8], value: &str) -> Record {
            Record::from_parts(0, &[&[key.len() as u8], key, value.as_bytes()].concat())
        }

        fn from_parts(stamp: u64, bytes: &[u8]) -> Record {
            Record(ThinArc::from_header_and_slice(stamp, bytes))
        }

        /// What stays of a deleted key where another copy of it may still arrive: it has no value.
        pub fn tombstone(key: &[u8]) -> Record {
            Record::new(key, "")
        }

        pub fn is_tombstone(&self) -> bool {
            self.value().is_empty()
        }

        /// A record as it travels between nodes; None if these are not a key and a value. (Whether the value is JSON was checked by the
        /// node that took it from a client. To check it again would hold everybody up for 5 ms where it has 1 MiB.)
        pub fn from_message(stamp: u64, bytes: &[u8]) -> Option<Record> {
            bytes.get(1 + *bytes.first()? as usize..)?;
            Some(Record::from_parts(stamp, bytes))
        }

        pub fn to_message(&self) -> (u64, ByteBuf) {
            (self.stamp(), ByteBuf::from(&self.0.slice))
        }

        pub fn stamp(&self) -> u64 {
            self.0.header.header
        }

        /// Stamps a record that was just made, and that nobody else has yet.
        pub fn set_stamp(&mut self, stamp: u64) {
            self.0.with_arc_mut(|arc| {
                if let Some(record) = triomphe::Arc::get_mut(arc) {
                    *record.header_mut() = stamp;
                }
            });
        }

        pub fn key(&self) -> &[u8] {
            &self.0.slice[1..1 + self.0.slice[0] as usize]
        }

        pub fn value(&self) -> &[u8] {
            &self.0.slice[1 + self.0.slice[0] as usize..]
        }

        fn position(&self) -> (u64, &[u8]) {
            (hash_of(self.key()), self.key())
        }

        /// Whether it stays where both are records of one key (the design's order of writes).
        pub fn beats(&self, other: &Record) -> bool {
            (self.stamp(), self.value()) > (other.stamp(), other.value())
        }

        /// What it adds to the digest of its bucket. Two writes hardly ever have the same stamp, so the beginning of a long
        /// value does; and a tombstone adds nothing, since replicas drop theirs at different times.
        fn digest(&self, hash: u64) -> u64 {
            if self.is_tombstone() {
                return 0;
            }
            let mut hasher = SipHasher24::new();
            hasher.write_u64(hash);
            hasher.write_u64(self.stamp());
            hasher.write_u64(self.value().len() as u64);
            hasher.write(&self.value()[..self.value().len().min(64)]);
            hasher.finish()
        }

        /// About what it takes in a message, in bytes.
        fn weight(&self) -> usize {
            self.0.slice.len() + 16
        }
    }

    /// With how many records a bucket is split in two: its table would have to double. (7 of 8 places of a table can be taken.)
    const BUCKET: usize = 7 * 128;
    /// With how many bytes of values it is, since what a part of a bucket has must fit into a message.
    const BUCKET_BYTES: usize = 4 << 20;
    /// What a record takes of memory beside its value, in bytes: about, for a short key.
    const OVERHEAD: usize = 80;

    /// The records of an instance. Each bucket begins at a hash value and reaches to where the next one begins.
    #[derive(Default)]
    pub struct Records {
        buckets: BTreeMap<u64, Bucket>,
        sums: Sums,
        /// About how many bytes of memory were freed one record at a time, since somebody last asked.
        freed: usize,
    }

    #[derive(Default)]
    struct Bucket {
        table: HashTable<Record>,
        sums: Sums,
    }

    /// What some records add up to.
    #[derive(Clone, Copy, Default)]
    struct Sums {
        /// How many of them are keys, and no tombstones.
        count: usize,
        /// The length of all values, as JSON text.
        bytes: usize,
        /// The XOR of their digests.
        digest: u64,
    }

    impl Sums {
        fn of(hash: u64, record: &Record) -> Sums {
            let count = usize::from(!record.is_tombstone());
            Sums { count, bytes: record.value().len(), digest: record.digest(hash) }
        }

        fn add(&mut self, more: Sums) {
            let Sums { count, bytes, digest } = *self;
            *self = Sums { count: count + more.count, bytes: bytes + more.bytes, digest: digest ^ more.digest };
        }

        fn subtract(&mut self, less: Sums) {
            let Sums { count, bytes, digest } = *self;
            *self = Sums { count: count - less.count, bytes: bytes - less.bytes, digest: digest ^ less.digest };
        }
    }

    impl Bucket {
        /// Clones those of some records that have the lowest places, of about `limit` bytes, and says where the first of the others is:
        /// at `end` if all fit.
        fn lowest(&self, records: &[&Record], limit: usize, end: Position) -> (Vec<Record>, Position) {
            let mut places: Vec<(u64, &[u8])> = records.iter().map(|record| record.position()).collect();
            places.sort_unstable();
            let (mut lowest, mut weight) = (Vec::new(), 0);
            for (hash, key) in places {
                if weight >= limit {
                    return (lowest, (hash, key.to_vec()));
                } else if let Some(record) = self.table.find(hash, |record| record.key() == key) {
                    weight += record.weight();
                    lowest.push(record.clone());
                }
            }
            (lowest, end)
        }
    }

    /// Which of some spans, which stand in order and do not overlap, a place is in.
    fn index_of(spans: &[Span], place: (u64, &[u8])) -> Option<usize> {
        let next = spans.partition_point(|span| (span.from.0, &span.from.1[..]) <= place);
        next.checked_sub(1).filter(|index| spans[*index].contains(place))
    }

    /// Whether some of these spans has something of a stretch.
    fn overlap(spans: &[Span], stretch: &Span) -> bool {
        let next = spans.partition_point(|span| span.to <= stretch.from);
        spans.get(next).is_some_and(|span| span.from < stretch.to)
    }

    impl Records {
        /// How many keys there are.
        pub fn len(&self) -> usize {
            self.sums.count
        }

        /// The length of all values, as JSON text.
        pub fn bytes(&self) -> usize {
            self.sums.bytes
        }

        /// The digest of all that there is.
        pub fn digest(&self) -> u64 {
            self.sums.digest
        }

        /// About how much memory they take, in bytes.
        pub fn footprint(&self) -> usize {
            self.sums.bytes + self.sums.count * OVERHEAD
        }

        pub fn take_freed(&mut self) -> usize {
            std::mem::take(&mut self.freed)
        }

        pub fn is_empty(&self) -> bool {
            self.buckets.values().all(|bucket| bucket.table.is_empty())
        }

        pub fn get(&self, hash: u64, key: &[u8]) -> Option<&Record> {
            let (_, bucket) = self.buckets.range(..=hash).next_back()?;
            bucket.table.find(hash, |record| record.key() == key)
        }

        /// The record of a key that is there, and not deleted.
        pub fn find(&self, hash: u64, key: &[u8]) -> Option<&Record> {
            self.get(hash, key).filter(|record| !record.is_tombstone())
        }

        /// Stores a record; returns the one it replaced.
        pub fn insert(&mut self, hash: u64, record: Record) -> Option<Record> {
            if self.buckets.is_empty() {
                self.buckets.insert(0, Bucket::default());
            }
            // A bucket at 0 is never taken away while there are others.
            let (first, bucket) = self.buckets.range_mut(..=hash).next_back()?;
            let (came, first) = (Sums::of(hash, &record), *first);
            bucket.sums.add(came);
            self.sums.add(came);
            let old = match bucket.table.entry(hash, |it| it.key() == record.key(), |it| hash_of(it.key())) {
                Entry::Occupied(mut old) => Some(std::mem::replace(old.get_mut(), record)),
                Entry::Vacant(place) => {
                    place.insert(record);
                    None
                }
            };
            if let Some(old) = &old {
                let went = Sums::of(hash, old);
                bucket.sums.subtract(went);
                self.sums.subtract(went);
                self.freed += went.bytes.saturating_sub(came.bytes);
            }
            if bucket.table.len() >= BUCKET || bucket.sums.bytes > BUCKET_BYTES && bucket.table.len() > 1 {
                self.split(first);
            }
            old
        }

        /// Splits a bucket in the middle of its stretch of hash values.
        fn split(&mut self, first: u64) {
            let last = self.buckets.range((Excluded(first), Unbounded)).next().map_or(u64::MAX, |(next, _)| next - 1);
            let middle = first + (last - first) / 2 + 1;
            let Some(bucket) = self.buckets.get_mut(&first).filter(|_| middle > first && middle <= last) else {
                return;
            };
            let moving: Vec<Record> = bucket.table.extract_if(|record| hash_of(record.key()) >= middle).collect();
            let mut upper = Bucket { table: HashTable::with_capacity(moving.len()), ..Bucket::default() };
            for record in moving {
                let hash = hash_of(record.key());
                bucket.sums.subtract(Sums::of(hash, &record));
                upper.sums.add(Sums::of(hash, &record));
                upper.table.insert_unique(hash, record, |it| hash_of(it.key()));
            }
            bucket.table.shrink_to_fit(|it| hash_of(it.key()));
            self.buckets.insert(middle, upper);
        }

        pub fn remove(&mut self, hash: u64, key: &[u8]) -> Option<Record> {
            let (first, bucket) = self.buckets.range_mut(..=hash).next_back()?;
            let (record, _) = bucket.table.find_entry(hash, |record| record.key() == key).ok()?.remove();
            let (went, first) = (Sums::of(hash, &record), *first);
            bucket.sums.subtract(went);
            self.sums.subtract(went);
            self.freed += went.bytes + OVERHEAD;
            self.tidy(first);
            Some(record)
        }

        /// Gives back the memory of a bucket that has become much emptier.
        fn tidy(&mut self, first: u64) {
            let Some(bucket) = self.buckets.get_mut(&first) else { return };
            if bucket.table.is_empty() && first > 0 {
                self.buckets.remove(&first);
            } else if bucket.table.len() < bucket.table.capacity() / 4 {
                bucket.table.shrink_to_fit(|it| hash_of(it.key()));
            }
        }

        /// The first hash value of the bucket that a place is in.
        fn bucket_at(&self, hash: u64) -> u64 {
            self.buckets.range(..=hash).next_back().map_or(0, |(first, _)| *first)
        }

        /// The buckets that may have something of some spans, which stand in order and do not overlap; each with the stretch of the order
        /// that it is for.
        fn buckets_of(&self, spans: &[Span]) -> impl Iterator<Item = (Span, &Bucket)> {
            let first = spans.first().map_or(0, |span| span.from.0);
            let last = spans.last().map_or(0, |span| span.to.0);
            let buckets = self.buckets.range(self.bucket_at(first)..);
            let ends = buckets.clone().skip(1).map(|(next, _)| (*next, Vec::new())).chain([end_of_order()]);
            // (A span from outside may end before it begins, which a range of the map must not.)
            let buckets = buckets.zip(ends).take_while(move |((first, _), _)| **first <= last);
            let buckets = buckets.map(|((first, bucket), to)| (Span { from: (*first, Vec::new()), to }, bucket));
            buckets.filter(|(stretch, _)| overlap(spans, stretch))
        }

        /// The part of each bucket that is in a span.
        pub fn parts_of(&self, span: &Span) -> Vec<Span> {
            span.cut_at(self.buckets_of(from_ref(span)).map(|(stretch, _)| stretch.from.0))
        }

        /// The digests of some spans, which stand in order and do not overlap. Looks at each record only of those buckets that
        /// are in several of them.
        pub fn digests_of(&self, spans: &[Span]) -> Vec<u64> {
            let mut digests = vec![0; spans.len()];
            for (stretch, bucket) in self.buckets_of(spans) {
                let first = index_of(spans, (stretch.from.0, &[]));
                if let Some(whole) = first.filter(|index| spans[*index].covers(&stretch)) {
                    digests[whole] ^= bucket.sums.digest;
                } else {
                    for record in &bucket.table {
                        let place = record.position();
                        if let Some(index) = index_of(spans, place) {
                            digests[index] ^= record.digest(place.0);
                        }
                    }
                }
            }
            digests
        }

        /// Clones all records of the first of some spans, which stand in order and do not overlap: of as many as have about `limit`
        /// bytes, and of one at least.
        pub fn all_of(&self, spans: &[Span], limit: usize) -> Vec<Vec<Record>> {
            let (mut found, mut weight) = (vec![Vec::new(); spans.len()], 0);
            for (stretch, bucket) in self.buckets_of(spans) {
                let whole = spans.partition_point(|span| span.to <= stretch.from);
                if weight >= limit && whole > 0 {
                    found.truncate(whole);
                    break;
                }
                for record in &bucket.table {
                    if let Some(index) = index_of(spans, record.position()) {
                        weight += record.weight();
                        found[index].push(record.clone());
                    }
                }
            }
            found
        }

        /// Clones the first records of a span, in no order and of about `limit` bytes, and says up to where these are all that there
        /// is.
        pub fn first_of(&self, span: &Span, limit: usize) -> (Vec<Record>, Position) {
            let (mut found, mut weight) = (Vec::new(), 0);
            for (stretch, bucket) in self.buckets_of(from_ref(span)) {
                let is_in = |record: &&Record| span.contains(record.position());
                let records: Vec<&Record> = bucket.table.iter().filter(is_in).collect();
                weight += records.iter().map(|record| record.weight()).sum::<usize>();
                if weight > limit && found.is_empty() {
                    return bucket.lowest(&records, limit, stretch.to.min(span.to.clone()));
                } else if weight > limit {
                    return (found, stretch.from);
                }
                found.extend(records.into_iter().cloned());
            }
            (found, span.to.clone())
        }

        /// Drops the records of a span. Of whole buckets, they are handed to the caller, since to free them takes a while.
        pub fn forget(&mut self, span: &Span) -> Records {
            let mut dropped = Records::default();
            let stretches: Vec<Span> = self.buckets_of(from_ref(span)).map(|(stretch, _)| stretch).collect();
            for stretch in stretches {
                let first = stretch.from.0;
                let Some(bucket) = self.buckets.get_mut(&first) else { continue };
                if span.covers(&stretch) {
                    let whole = std::mem::take(bucket);
                    self.sums.subtract(whole.sums);
                    dropped.sums.add(whole.sums);
                    dropped.buckets.insert(first, whole);
                } else {
                    let leaving = bucket.table.extract_if(|record| span.contains(record.position()));
                    for record in leaving.collect::<Vec<Record>>() {
                        let went = Sums::of(hash_of(record.key()), &record);
                        bucket.sums.subtract(went);
                        self.sums.subtract(went);
                    }
                }
                self.tidy(first);
            }
            dropped
        }

        /// How many keys a span has.
        pub fn count_of(&self, span: &Span) -> usize {
            let is_in = |record: &&Record| !record.is_tombstone() && span.contains(record.position());
            let count = |(stretch, bucket): (Span, &Bucket)| match span.covers(&stretch) {
                true => bucket.sums.count,
                false => bucket.table.iter().filter(is_in).count(),
            };
            self.buckets_of(from_ref(span)).map(count).sum()
        }

        /// The place of the n-th highest key of some spans, which stand in order and do not overlap; the lowest place of all if there are
        /// fewer. Steps over buckets, not keys.
        pub fn nth_highest(&self, n: usize, spans: &[Span]) -> Position {
            let mut left = n;
            let buckets: Vec<(Span, &Bucket)> = self.buckets_of(spans).collect();
            for (stretch, bucket) in buckets.into_iter().rev() {
                let is_whole = index_of(spans, (stretch.from.0, &[])).is_some_and(|it| spans[it].covers(&stretch));
                if is_whole && bucket.sums.count < left {
                    left -= bucket.sums.count;
                } else {
                    let keys = bucket.table.iter().filter(|record| !record.is_tombstone()).map(Record::position);
                    let mut places: Vec<(u64, &[u8])> = keys.filter(|it| index_of(spans, *it).is_some()).collect();
                    places.sort_unstable();
                    match places.len().checked_sub(left) {
                        Some(index) => return (places[index].0, places[index].1.to_vec()),
                        None => left -= places.len(),
                    }
                }
            }
            Position::default()
        }
    }
}

// ---- Owners: who answers a request ----------------------------------------------------------------------------------

/// What this instance is. A follower has its main instance's address, a node its own.
enum Role {
    Main,
    Follower(String),
    Node(String),
}

/// This node's own address; None for a main instance and a follower.
fn own() -> Option<&'static str> {
    if let Role::Node(own) = &SETTINGS.role { Some(own) } else { None }
}

/// What is left to be done for an answer.
type Work = Box<dyn FnOnce() -> Answer + Send>;

/// The whole road of a request, from its owner to its answer. Answers it at once if this instance can do so alone. What has to ask
/// other instances is returned as work.
fn answer_or_defer(request: Request) -> Result<Answer, Work> {
    match request.origin {
        Origin::Message => return answer_message(&request.body),
        Origin::Push => return Ok(answer_push(&request.body)),
        Origin::Client | Origin::Node(_) => {}
    }
    let (resource, vocabulary) = request.route();
    match (&SETTINGS.role, &resource) {
        // What an instance is, only that instance can say.
        (Role::Follower(main), resource) if !is_about_this_instance(resource, &request) => {
            let patience = if let Resource::ViewChange = resource { CHANGE_LIMIT } else { PATIENCE };
            Err(Box::new(move || {
                let verb = request.verb.clone();
                let down = |_| Outcome::MainDown.answer(vocabulary, &verb);
                Peer::at(main).relay(request, patience).unwrap_or_else(down)
            }))
        }
        (_, Resource::Key(_)) if request.body.len() > LARGE_BODY => {
            let verb = request.verb.clone();
            let in_vain = move |_| Outcome::MainDown.answer(vocabulary, &verb);
            Err(Box::new(move || in_background(|| answer_key(request)).unwrap_or_else(in_vain)))
        }
        (_, Resource::Key(_)) => answer_key(request),
        _ => Err(Box::new(move || answer_about(request))),
    }
}

/// Above this, in bytes, a body is parsed in the background: 4 MiB of JSON escapes take 30 ms.
const LARGE_BODY: usize = 128 << 10;

/// `answer_or_defer` for a request that is about a key.
fn answer_key(request: Request) -> Result<Answer, Work> {
    let (Resource::Key(key), vocabulary) = request.route() else { return Ok(answer_about(request)) };
    let context = match causal_context(&request, vocabulary) {
        Ok(context) => context,
        Err(refusal) => return Ok(refusal.answer(vocabulary, &request.verb)),
    };
    let (hash, action) = (hash_of(&key), Action::of(&key, &request, vocabulary));
    let (tried, began) = Live.with(|node| (perform(node, hash, &key, action, context, request.origin), node.now));
    match tried {
        Tried::Done(outcome, context) => Ok(outcome.answer(vocabulary, &request.verb).with_context(&context)),
        tried => {
            let key = key.into_owned();
            Err(Box::new(move || block_on(answer_for_key(&Live, &key, tried, began, &request, vocabulary))))
        }
    }
}

/// Whether only the instance that is asked can answer. (A verb that no instance takes there is left to the main instance.)
fn is_about_this_instance(resource: &Resource, request: &Request) -> bool {
    match resource {
        Resource::Instance => request.verb == "GET",
        Resource::Metrics => true,
        _ => false,
    }
}

/// What a request wants done with the record of its key.
enum Action {
    Get,
    Delete,
    Put(Record),
    Refuse(Outcome),
}

impl Action {
    fn of(key: &[u8], request: &Request, vocabulary: Vocabulary) -> Action {
        match request.verb.as_str() {
            "GET" => Action::Get,
            "DELETE" => Action::Delete,
            "PUT" => record_of(key, request, vocabulary).map_or_else(Action::Refuse, Action::Put),
            _ => Action::Refuse(Outcome::VerbNotAllowed(KEY_VERBS)),
        }
    }
}

/// What became of a request at this instance so far; and its causal context, if it had one.
enum Tried {
    Done(Outcome, Option<Causal>),
    /// A record was written, which the other replicas are to have before this is answered.
    Written(Outcome, Record, Option<Causal>),
    /// This instance may not answer for the key now: the place says why. What the request wants is still to be done.
    NotHere(Place, Action, Option<Causal>),
    /// The context asks for a newer record of the key than the one that is here.
    Behind(Action, Option<Causal>),
    /// Some replica may lack the record that is here, but none is silent: its writer is probably about to tell that all have it.
    Settling(Action, Option<Causal>),
}

/// Does what a request wants if this instance has the key.
fn perform(node: &mut Node, hash: u64, key: &[u8], action: Action, context: Option<Causal>, origin: Origin) -> Tried {
    use Outcome::*;
    if let Origin::Node(store) = origin
        && node.store().is_some_and(|own| own != store)
    {
        return Tried::Done(Elsewhere, context);
    } else if context.iter().flat_map(Causal::values).any(|stamp| *stamp > node.latest()) {
        return Tried::Done(ContextInvalid, None);
    }
    let place = node.place(hash, key);
    if place != Place::Here {
        return Tried::NotHere(place, action, context);
    } else if node.is_replicated() {
        return perform_replicated(node, hash, key, action, context);
    }
    // (A tombstone may be left from when there were several replicas.)
    let is_key = |record: &Record| !record.is_tombstone();
    let outcome = match action {
        Action::Get => node.records.find(hash, key).cloned().map_or(Missing, Found),
        Action::Delete => node.records.remove(hash, key).filter(is_key).map_or(Missing, |_| Deleted),
        Action::Put(mut record) => node.put(hash, &mut record).filter(is_key).map_or(Created, |_| Replaced),
        Action::Refuse(outcome) => outcome,
    };
    // With one replica nobody can lack anything.
    Tried::Done(outcome, context.map(|_| Causal::new()))
}

/// `perform` where the key's shard has several replicas.
fn perform_replicated(node: &mut Node, hash: u64, key: &[u8], action: Action, context: Option<Causal>) -> Tried {
    use Outcome::*;
    let known = context.clone().unwrap_or_default();
    let found = node.records.find(hash, key).cloned();
    if matches!(action, Action::Get | Action::Delete) && !node.satisfies(hash, key, &known) {
        return Tried::Behind(action, context);
    }
    match action {
        Action::Refuse(outcome) => Tried::Done(outcome, context),
        Action::Put(record) => {
            write(node, hash, record, if found.is_some() { Replaced } else { Created }, known, context)
        }
        Action::Delete if found.is_some() => write(node, hash, Record::tombstone(key), Deleted, known, context),
        Action::Get if context.is_some() && node.is_settling(hash, key) => Tried::Settling(action, context),
        Action::Get | Action::Delete => {
            let after = context.map(|context| node.context_after(context, hash, key));
            Tried::Done(found.map_or(Missing, Found), after)
        }
    }
}

/// Does what a request wants with what is here of the key, without waiting any longer for what its context asks for.
fn perform_anyway(node: &mut Node, hash: u64, key: &[u8], action: Action, context: Option<Causal>) -> Tried {
    let mut known = context.clone().unwrap_or_default();
    node.know(&known);
    let asked_for = str::from_utf8(key).ok().and_then(|key| known.remove(key));
    let found = node.records.find(hash, key).cloned();
    match action {
        _ if node.place(hash, key) != Place::Here => Tried::NotHere(node.place(hash, key), action, context),
        // A key that the client knows of is deleted, also if this replica never saw it.
        Action::Delete if found.is_some() || asked_for.is_some() => {
            write(node, hash, Record::tombstone(key), Outcome::Deleted, known, context)
        }
        Action::Get | Action::Delete => {
            let after = context.map(|_| node.context_after(known, hash, key));
            Tried::Done(found.map_or(Outcome::Missing, Outcome::Found), after)
        }
        Action::Put(_) | Action::Refuse(_) => perform_replicated(node, hash, key, action, context),
    }
}

/// Writes a record here, for a client that knows of what is `known`.
fn write(
    node: &mut Node,
    hash: u64,
    mut record: Record,
    outcome: Outcome,
    known: Causal,
    context: Option<Causal>,
) -> Tried {
    node.know(&known);
    node.put(hash, &mut record);
    node.note_write(&record, known);
    Tried::Written(outcome, record, context)
}

/// Answers what is about no key. (Not inlined where every request passes: it would cost each connection a page of its stack.)
#[inline(never)]
fn answer_about(request: Request) -> Answer {
    use Outcome::*;
    let (resource, vocabulary) = request.route();
    let outcome = match (&resource, request.verb.as_str()) {
        (Resource::Instance, "GET") => Instance(describe_instance()),
        (Resource::Metrics, "GET") => Metrics(metrics()),
        (Resource::KeyCount, "GET") => block_on(count_keys(&Live)).unwrap_or_else(|failure| failure),
        (Resource::ViewChange, "PUT") | (Resource::Shards(_), "GET") if own().is_none() => AddressNotSet,
        (Resource::Shards(id), "GET") => block_on(describe_shards(&Live, *id)).unwrap_or_else(|failure| failure),
        (Resource::ViewChange, "PUT") => match wanted_view(&request.body) {
            Ok(wanted) => return block_on(answer_view_change(&Live, &request, &wanted)),
            Err(refusal) => refusal,
        },
        (Resource::Unknown, _) => NotFound,
        (Resource::ViewChange, _) => VerbNotAllowed(PUT_ONLY),
        _ => VerbNotAllowed(GET_ONLY),
    };
    outcome.answer(vocabulary, &request.verb)
}

/// What a view change asks for.
struct WantedView {
    view: Vec<String>,
    /// The factor stays as it is if none is named.
    factor: Option<usize>,
    force: bool,
}

fn wanted_view(body: &[u8]) -> Result<WantedView, Outcome> {
    // What a client sent is quoted, in so far as it can stand in an answer.
    let is_unfit = |letter: char| letter == '"' || letter == '\\' || letter.is_control();
    let invalid =
        |reason: String| Outcome::ViewInvalid(reason.chars().take(400).collect::<String>().replace(is_unfit, "'"));
    let view = member(body, "view")?;
    let view = match (serde_json::from_str::<String>(view), serde_json::from_str::<Vec<String>>(view)) {
        _ if view == "null" => return Err(Outcome::ViewMissing),
        (Ok(text), _) => parse_view(text.split(',')),
        (_, Ok(nodes)) => parse_view(nodes.iter().map(String::as_str)),
        _ => Err("it is neither a string nor an array of strings".into()),
    };
    let view = view.map_err(invalid)?;
    let force = match member(body, "force")? {
        "true" => true,
        "false" | "null" => false,
        force => return Err(invalid(format!("force is {force}, neither true nor false"))),
    };
    let factor = match member(body, "repl-factor")? {
        "null" => None,
        text => match parse_factor(text, view.len()) {
            Ok(factor) => Some(factor),
            Err(expected) => return Err(invalid(format!("repl-factor is {text}, not {expected}"))),
        },
    };
    Ok(WantedView { view, factor, force })
}

fn describe_instance() -> String {
    let (count, table, more) = Live.with(|node| (node.keys(), node.table(), node.describe()));
    let view = table.map_or(SETTINGS.view.clone(), |table| table.view.clone()).join(r#"",""#);
    let (role, more) = match &SETTINGS.role {
        Role::Main => ("main", format!(r#""key-count":{count}"#)),
        Role::Follower(main) => ("follower", format!(r#""forwarding-address":"{main}""#)),
        Role::Node(own) => ("node", format!(r#""address":"{own}","view":["{view}"],"key-count":{count}{more}"#)),
    };
    format!(r#""role":"{role}","version":"{VERSION}",{more}"#)
}

/// What clients were answered since the start: by verb, and by the first digit of the status.
static ANSWERED: [[AtomicU64; 6]; 4] = [const { [const { AtomicU64::new(0) }; 6] }; 4];
const VERBS: [&str; 4] = ["GET", "PUT", "DELETE", "other"];
/// What was relayed to other instances since the start, and how often there was no answer.
static RELAYED: AtomicU64 = AtomicU64::new(0);
static RELAYED_IN_VAIN: AtomicU64 = AtomicU64::new(0);

fn count_answer(verb: &str, status: u16) {
    let index = VERBS.iter().position(|it| *it == verb).unwrap_or(3);
    if let Some(count) = ANSWERED[index].get(status as usize / 100) {
        count.fetch_add(1, Relaxed);
    }
}

/// What this instance counts, in the text format of Prometheus, version 0.0.4, without the last line break.
fn metrics() -> String {
    let mut text = String::new();
    let head =
        |name: &str, kind: &str, help: &str| format!("# HELP kv_store_{name} {help}\n# TYPE kv_store_{name} {kind}\n");
    text += &head("requests_total", "counter", "Answers to clients, by verb and class of status.");
    for (verb, counts) in VERBS.iter().zip(&ANSWERED) {
        for (class, count) in counts.iter().enumerate().skip(2) {
            let count = count.load(Relaxed);
            text += &format!("kv_store_requests_total{{verb=\"{verb}\",class=\"{class}xx\"}} {count}\n");
        }
    }
    let (keys, bytes, [epoch, number, to_fetch, silent]) =
        Live.with(|node| (node.keys() as u64, node.records.bytes() as u64, node.gauges()));
    let connections = lock(&CONNECTIONS).len() as u64;
    for (name, kind, help, value) in [
        ("relays_total", "counter", "Requests relayed to other instances.", RELAYED.load(Relaxed)),
        ("relay_failures_total", "counter", "Relays without an answer.", RELAYED_IN_VAIN.load(Relaxed)),
        ("keys", "gauge", "Keys held.", keys),
        ("value_bytes", "gauge", "Bytes of the values held.", bytes),
        ("connections", "gauge", "Open connections.", connections),
        ("table_epoch", "gauge", "Epoch of the table that this node goes by.", epoch),
        ("table_number", "gauge", "Number of that table within its epoch.", number),
        ("keys_to_fetch", "gauge", "Keys that this node has still to fetch, as far as it knows.", to_fetch),
        ("silent_nodes", "gauge", "Nodes that do not answer this one.", silent),
    ] {
        text += &format!("{}kv_store_{name} {value}\n", head(name, kind, help));
    }
    text.trim_end().to_owned()
}

// ---- Tables: which shard has which key, and who else may have some of it --------------------------------------------

mod table {
    //! A table cuts the order of keys into ranges and says which shard owns each. It also names the *sources* of a range: the
    //! nodes that may still have keys of it, because it was theirs before, in groups: the replicas of a former shard should all
    //! have the same. Every node of a store has the table.

    use super::*;

    /// Tables come in one order: by epoch, then by number, then by who made them. The version of a table is that of the lock
    /// under which it was made. A new epoch begins when silent nodes are left out: it beats whatever these may have made.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
    pub struct Version {
        pub epoch: u64,
        pub number: u64,
        /// Decides between two tables with the same number, and tells who made it: the incarnation of the coordinator. Nobody made
        /// a first table: there it is the number of nodes, so that the larger view counts, and a hash of the view.
        pub coordinator: u64,
    }

    impl Version {
        pub fn is_first(&self) -> bool {
            (self.epoch, self.number) == (0, 0)
        }
    }

    impl Display for Version {
        fn fmt(&self, out: &mut Formatter) -> fmt::Result {
            write!(out, "{}.{}", self.epoch, self.number)
        }
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub struct Range {
        pub from: Position,
        /// The owner, by its index among the shards.
        pub shard: usize,
        pub sources: Vec<Vec<String>>,
    }

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub struct Table {
        pub version: Version,
        /// The table that this one was made from.
        pub base: Version,
        /// What is the same in all tables that come from one first table, and differs in another store's.
        pub store: u64,
        pub view: Vec<String>,
        /// How many nodes a shard has at least, as long as there are as many.
        pub factor: usize,
        /// The nodes of each shard, its replicas, by their indices in the view.
        pub shards: Vec<Vec<usize>>,
        pub ranges: Vec<Range>,
        /// How many keys change their shard with this table.
        pub moved: usize,
    }

    /// How many ranges a table from outside may have.
    const MAX_RANGES: usize = 100_000;

    impl Table {
        /// The table of a store that had no view change: as much of the order for each shard, and the nodes dealt out in the
        /// order of the view.
        pub fn first(view: Vec<String>, factor: usize) -> Table {
            let mut shards = Vec::new();
            let mut next = 0;
            for size in shard_sizes(view.len(), factor) {
                shards.push((next..next + size).collect());
                next += size;
            }
            let share = |index| ((index as u128 * (1 << 64) / shards.len() as u128) as u64, Vec::new());
            let range = |shard| Range { from: share(shard), shard, sources: Vec::new() };
            let ranges = (0..shards.len()).map(range).collect();
            let coordinator =
                (view.len() as u64) << 48 | hash_of(format!("{} {factor}", view.join(",")).as_bytes()) >> 16;
            let version = Version { coordinator, ..Version::default() };
            Table { version, base: Version::default(), store: coordinator, factor, shards, view, ranges, moved: 0 }
        }

        /// Checks a table from outside.
        pub fn is_valid(&self) -> bool {
            let indices_exist = |shard: &Vec<usize>| !shard.is_empty() && shard.iter().all(|it| *it < self.view.len());
            parse_view(self.view.iter().map(String::as_str)).is_ok()
                && (1..=1000).contains(&self.factor)
                && !self.shards.is_empty()
                && self.shards.len() <= self.view.len()
                && self.shards.iter().all(indices_exist)
                && self.ranges.first().is_some_and(|range| range.from == Position::default())
                && self.ranges.len() <= MAX_RANGES
                && self.ranges.is_sorted_by(|one, next| one.from < next.from)
                && self.ranges.iter().all(|range| range.shard < self.shards.len() && range.from.1.len() <= 200)
                && self
                    .ranges
                    .iter()
                    .flat_map(|range| range.sources.iter().flatten())
                    .all(|source| port_of(source).is_some())
                && self.version.epoch < u64::MAX / 2
                && self.version.number < u64::MAX / 2
        }

        /// The index of the range that a place is in. The table must be valid.
        fn range_at(&self, hash: u64, key: &[u8]) -> usize {
            self.ranges.partition_point(|range| (range.from.0, &range.from.1[..]) <= (hash, key)) - 1
        }

        pub fn shard_at(&self, hash: u64, key: &[u8]) -> usize {
            self.ranges[self.range_at(hash, key)].shard
        }

        /// The nodes of a shard.
        pub fn nodes_of(&self, shard: usize) -> impl Iterator<Item = &String> + Clone {
            self.shards[shard].iter().map(|index| &self.view[*index])
        }

        /// The same, to be kept.
        pub fn replicas(&self, shard: usize) -> Vec<String> {
            self.nodes_of(shard).cloned().collect()
        }

        pub fn shard_of(&self, node: &str) -> Option<usize> {
            let index = self.view.iter().position(|it| it == node)?;
            self.shards.iter().position(|shard| shard.contains(&index))
        }

        pub fn lists(&self, node: &str) -> bool {
            self.view.iter().any(|it| it == node)
        }

        pub fn sources(&self) -> BTreeSet<String> {
            set_of(self.ranges.iter().flat_map(|range| range.sources.iter().flatten()).cloned())
        }

        /// Each range as a span.
        pub fn spans(&self) -> impl Iterator<Item = (Span, &Range)> {
            let ends = self.ranges.iter().skip(1).map(|range| range.from.clone()).chain([end_of_order()]);
            self.ranges.iter().zip(ends).map(|(range, to)| (Span { from: range.from.clone(), to }, range))
        }

        /// The table after this one. Each shard gives away what is above its cuts. The sources of a range are the nodes that own it
        /// by this table and, unless this table is `complete` (all has been fetched), its sources in this table; but never the nodes
        /// that are given up.
        pub fn next(
            &self,
            version: Version,
            change: &Change,
            cuts: &[Cut],
            given_up: &[String],
            complete: bool,
        ) -> Table {
            let places = self.ranges.iter().map(|range| &range.from).chain(cuts.iter().map(|cut| &cut.place));
            self.over(places, version, change, |number, place, old| {
                let is_above = |cut: &&Cut| (cut.place.0, &cut.place.1[..]) <= place;
                let cut = cuts.iter().filter(is_above).find(|cut| cut.giver == old);
                let owner = cut.map(|cut| cut.receiver).or(change.kept[old]);
                // What a shard that ends gives to nobody holds no keys, or is given up: it is dealt out.
                owner.unwrap_or(number % change.shards.len())
            })
            .with_sources(self, given_up, complete)
        }

        /// The table after this one for a store without keys: as much for each shard as in a first table.
        pub fn next_even(&self, version: Version, change: &Change, given_up: &[String], complete: bool) -> Table {
            let even = Table::first(change.view.clone(), change.factor);
            let places = self.ranges.iter().chain(&even.ranges).map(|range| &range.from);
            self.over(places, version, change, |_, (hash, key), _| even.shard_at(hash, key))
                .with_sources(self, given_up, complete)
        }

        /// A table whose ranges begin at these places; `owner` tells the shard by the number of the range, its place and which
        /// shard has it now.
        fn over<'a>(
            &self,
            places: impl Iterator<Item = &'a Position>,
            version: Version,
            change: &Change,
            owner: impl Fn(usize, (u64, &[u8]), usize) -> usize,
        ) -> Table {
            let mut places: Vec<(u64, &[u8])> = places.map(|(hash, key)| (*hash, &key[..])).collect();
            places.sort_unstable();
            places.dedup();
            let range = |(number, (hash, key)): (usize, (u64, &[u8]))| {
                let shard = owner(number, (hash, key), self.shard_at(hash, key));
                Range { from: (hash, key.to_vec()), shard, sources: Vec::new() }
            };
            let ranges = places.into_iter().enumerate().map(range).collect();
            let Change { view, factor, shards, .. } = change;
            let (view, factor, shards) = (view.clone(), *factor, shards.clone());
            Table { version, base: self.version, store: self.store, factor, view, shards, ranges, moved: 0 }
        }

        fn with_sources(mut self, old: &Table, given_up: &[String], complete: bool) -> Table {
            for index in 0..self.ranges.len() {
                let owners = set_of(self.replicas(self.ranges[index].shard));
                let range = &mut self.ranges[index];
                let before = &old.ranges[old.range_at(range.from.0, &range.from.1)];
                let unfinished = if complete { &[] } else { &before.sources[..] };
                let former = old.replicas(before.shard);
                for group in unfinished.iter().chain([&former]) {
                    let group = set_of(group.iter().filter(|node| !given_up.contains(node)).cloned());
                    // Where the owners are the same as before, they have what they had, and compare it among themselves.
                    let is_news = !group.is_empty() && group != owners;
                    let group: Vec<String> = group.into_iter().collect();
                    if is_news && !range.sources.contains(&group) {
                        range.sources.push(group);
                    }
                }
            }
            self.ranges.dedup_by(|next, one| (next.shard, &next.sources) == (one.shard, &one.sources));
            self
        }
    }

    /// What is above a place leaves its giver for a receiver, each a shard of its table.
    pub struct Cut {
        pub giver: usize,
        pub place: Position,
        pub receiver: usize,
    }

    /// A giver (a shard of the old table), a receiver (one of the new), and how many keys.
    pub type Move = (usize, usize, usize);

    /// How many nodes each shard has.
    fn shard_sizes(nodes: usize, factor: usize) -> Vec<usize> {
        let count = (nodes / factor).max(1);
        (0..count).map(|shard| nodes / count + usize::from(shard < nodes % count)).collect()
    }

    /// Another view, dealt out in shards.
    pub struct Change {
        pub view: Vec<String>,
        pub factor: usize,
        pub shards: Vec<Vec<usize>>,
        /// By the old shards: which of the new ones each goes on as, or that it ends.
        pub kept: Vec<Option<usize>>,
    }

    impl Change {
        /// Deals out a view so that as few nodes as possible change their shard: of the old shards those with most nodes left
        /// go on, and the nodes that are too many for one, or new, fill up the others. The shards are numbered in the order of
        /// their first nodes in the view.
        pub fn new(old: &Table, view: &[String], factor: usize) -> Change {
            let sizes = shard_sizes(view.len(), factor);
            let staying = |shard: &Vec<usize>| -> Vec<usize> {
                let stays = |(_, node): &(usize, &String)| shard.iter().any(|index| old.view[*index] == **node);
                view.iter().enumerate().filter(stays).map(|(index, _)| index).collect()
            };
            let left: Vec<Vec<usize>> = old.shards.iter().map(staying).collect();
            // The largest first, since they get the largest sizes, and the last ones end. Of equals the earlier goes on.
            let largest_first = in_order(left.iter().map(|nodes| u64::MAX - nodes.len() as u64)).into_iter();
            let mut groups: Vec<(Option<usize>, Vec<usize>)> =
                largest_first.map(|shard| (Some(shard), left[shard].clone())).collect();
            groups.retain(|(_, nodes)| !nodes.is_empty());
            groups.resize(sizes.len(), (None, Vec::new()));
            for ((_, nodes), size) in groups.iter_mut().zip(&sizes) {
                nodes.truncate(*size);
            }
            let taken: Vec<usize> = groups.iter().flat_map(|(_, nodes)| nodes.clone()).collect();
            let mut free = (0..view.len()).filter(|index| !taken.contains(index));
            for ((_, nodes), size) in groups.iter_mut().zip(&sizes) {
                nodes.extend(free.by_ref().take(size - nodes.len()));
                let sorted = in_order(nodes.iter().map(|index| *index as u64));
                *nodes = sorted.into_iter().map(|it| nodes[it]).collect();
            }
            let by_first = in_order(groups.iter().map(|(_, nodes)| nodes[0] as u64));
            let goes_on_as = |shard: usize| by_first.iter().position(|group| groups[*group].0 == Some(shard));
            let kept = (0..old.shards.len()).map(goes_on_as).collect();
            let shards = by_first.iter().map(|group| groups[*group].1.clone()).collect();
            Change { view: view.to_vec(), factor, shards, kept }
        }

        /// Who gives how many keys to whom so that the shards differ by one key at most, and no key moves without need; and how
        /// many keys each has then. `held` is what the old shards have.
        pub fn plan(&self, held: &[usize]) -> (Vec<Move>, Vec<usize>) {
            let (total, count): (usize, usize) = (held.iter().sum(), self.shards.len());
            let mut counts = vec![0; count];
            for (keys, shard) in held.iter().zip(&self.kept) {
                if let Some(shard) = shard {
                    counts[*shard] = *keys;
                }
            }
            // The shards with most keys take the remainder: that saves them a move.
            let largest_first = in_order(counts.iter().map(|count| u64::MAX - *count as u64));
            let mut targets = vec![0; count];
            for (rank, shard) in largest_first.into_iter().enumerate() {
                targets[shard] = total / count + usize::from(rank < total % count);
            }
            let mut moves = Vec::new();
            for (giver, keys) in held.iter().enumerate() {
                let mut surplus = self.kept[giver].map_or(*keys, |shard| keys.saturating_sub(targets[shard]));
                for receiver in 0..count {
                    let moving = surplus.min(targets[receiver].saturating_sub(counts[receiver]));
                    if moving > 0 {
                        surplus -= moving;
                        counts[receiver] += moving;
                        moves.push((giver, receiver, moving));
                    }
                }
            }
            (moves, targets)
        }
    }
}

// ---- The node: what it knows of its store, and what it decides ------------------------------------------------------

mod node {
    //! A store has no moment at which all of its nodes agree, and needs none.
    //!
    //! **With one replica of each shard**, a key is answered for by the one node that has it, until that node hands it on:
    //!
    //! - A node answers for a key if its table gives it the key, and no source of that range can have it any more (`place`).
    //! - Who adopts a newer table answers from then on for nothing that it gives to others, and keeps those records until the
    //!   new owner has them (`adopt`).
    //! - The new owner fetches them, from nodes that go by its table only. It answers for a key once the source has
    //!   forgotten it (`merge`, `arrived`). A node that does not know the newer table goes on answering, and rightly: nobody can
    //!   have fetched from it.
    //!
    //! So a PUT to a key that is just being moved meets, at the old owner before that adopts the table, `Place::Here`: it is written
    //! and moves later. After that, `Place::Node`: it is relayed (`pass_on`). The new owner, if it has not heard of the table,
    //! answers 421; the old owner meets it, it sees that the old owner is ahead (`take_ahead`), asks back, and adopts the table that
    //! comes in the reply (`hear`, `consider`). Then it finds `Place::Incoming`: it fetches the beginning of that span from the source
    //! (`fetch`), has it forgotten there, and writes.
    //!
    //! **With several replicas**, the order of stamps decides: of two records of a key the one with the higher stamp stays,
    //! wherever and however often they meet. So replicas may take writes on their own, give records twice, and answer while others
    //! still fetch. What one of them may lack, the others have in mind (`Agreement`).
    //!
    //! So when a replica dies in the middle of a write, there are two cases. If it was to store what another one wrote, its silence
    //! is noted as soon as the connection to it breaks, or after `PUSH_LIMIT` (`push_to`); the write is acknowledged without it
    //! (`replicate`), and remains in mind as one that it may lack, until it has fetched its shard and been compared with. (If it is
    //! back already, and blank, it refuses the push: then it fetches the record with the rest.) If it was the one that wrote, its
    //! client gets no answer, or from a node in between 501 or 503, and the write may have reached some of the others: whoever has it
    //! holds it in mind as one that others may lack, and `compare` brings it to all of them.
    //!
    //! The words: a node is *blank* when it has just started and goes by no table yet. One *life* of a node, from start to end, is told
    //! by its *incarnation*, a random number. To *go by* a table is to answer by it. A *range* of the table is *incoming* at its owner as
    //! long as one of its *sources* has not been heard; it *blocks* as long as the owner cannot answer for its keys. A table is
    //! *complete* when all of its nodes have fetched what it gives them. A node that grants a coordinator its *lock* keeps a *promise*: a
    //! promise is *void* when nothing can come of it any more. A record is *open* if some replica may lack it, and *settled* when all have it.
    //!
    //! This type is a value that gets messages and the time, and gives answers: no statics, no clock, no network. What it does
    //! over time stands in the next section; the simulation at the end runs both, many nodes in one process.

    use super::*;

    /// What a node tells of itself in every message and every reply.
    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub struct Status {
        /// A random number, new at each start.
        pub incarnation: u64,
        /// The table that it goes by; none yet if it is blank.
        pub version: Option<Version>,
        /// The store that this table is of.
        pub store: Option<u64>,
        /// As far as it knows, all nodes have fetched what that table gives them.
        pub complete: bool,
        /// Whether that table lists it, how many nodes it lists, and how many keys this one has.
        pub is_member: bool,
        pub members: usize,
        pub keys: usize,
        /// The nodes that it has still to fetch from; and of these, the groups of nodes that have the same, of which it needs one
        /// before it answers for all its keys.
        pub incoming: Vec<String>,
        pub waits_for: Vec<Vec<String>>,
        /// The newest lock that it asked for as a coordinator, and whether it is still at it.
        pub coordinated: Version,
        pub coordinating: bool,
        pub promises: Vec<Promise>,
        /// Its `VIEW` and `REPL_FACTOR`, and for how many rounds it has been up.
        pub first_view: Vec<String>,
        pub factor: usize,
        pub rounds: u32,
        /// The time by its clock, in microseconds since 1970, and the highest stamp that it knows.
        pub time: u64,
        pub stamp: u64,
        /// Of a replica: the digest of all that it has. None as long as it lacks something, or keeps something for others.
        pub digest: Option<u64>,
        /// Of a replica: what it knows of the claims of all nodes (see `Agreement`).
        pub claims: BTreeMap<String, u64>,
        /// The table itself, in a reply to one that does not have it. A table comes in replies only, since these are awaited:
        /// in a message it could be as late as a life of its sender, and of the whole store, ago.
        pub table: Option<Table>,
        /// Who goes by that table: itself or, if it is blank, those it heard it from.
        pub tellers: BTreeSet<String>,
    }

    impl Status {
        /// Checks the names in what comes from outside.
        pub fn is_plain(&self) -> bool {
            let promises = self.promises.iter().flat_map(|promise| promise.nodes.iter().chain([&promise.coordinator]));
            let known = self.tellers.iter().chain(self.claims.keys());
            let awaited = self.incoming.iter().chain(self.waits_for.iter().flatten());
            let mut names = awaited.chain(&self.first_view).chain(known).chain(promises);
            names.all(|name| is_plain(name))
        }
    }

    /// A lock that this node granted: it takes part in a change whose table will have this version.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub struct Promise {
        pub version: Version,
        /// The store that the coordinator's table is of.
        pub store: Option<u64>,
        pub coordinator: String,
        /// All nodes that the change names: one of them may go by its table when nobody else knows of it.
        pub nodes: Vec<String>,
        /// When this life of the node granted it. Zero is a promise that others told of.
        #[serde(skip)]
        granted: Duration,
    }

    /// What a node says to another.
    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub struct Envelope {
        pub from: String,
        /// A node by another name than its own answers to nothing: it would be counted twice or not at all.
        pub to: String,
        pub status: Status,
        pub message: Message,
    }

    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub enum Message {
        /// Nothing but what every message tells.
        Meet,
        /// Promise to take part in a change that makes this version and names these nodes. The promises of the versions that come
        /// last are void: all nodes that they name have granted this coordinator its lock, or are given up. Drop them.
        Lock(Version, Vec<String>, Vec<Version>),
        /// Under that lock: where are your n-th highest keys? (And whether every node has what your table gives it: then drop what
        /// is others'.)
        Cut(Version, Vec<usize>, bool),
        /// I have all records of this span now: forget them. Both of us go by the table of this version.
        Forget(Version, Span),
        /// Give me the first records of this span, up to about this many bytes.
        Give(Version, Span, usize),
        /// How many keys do you have of these spans?
        Count(Version, Vec<Span>),
        /// What are the digests of these spans?
        Digests(Version, Vec<Span>),
        /// Give me all records of these spans, or of the first of them; and whether a client waits for them.
        GiveAll(Version, Vec<Span>, bool),
    }

    /// A record on its way: its stamp, its bytes, and its writer's context as long as that matters.
    pub type Copied = (u64, ByteBuf, Causal);

    impl Message {
        /// A node that does not answer in this time is silent. A round of meetings must fit into the second that one which
        /// starts waits to hear of the others.
        pub fn limit(&self) -> Duration {
            let is_short = matches!(self, Message::Meet | Message::GiveAll(.., true));
            Duration::from_millis(if is_short { 700 } else { 1500 })
        }
    }

    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub enum Reply {
        Done,
        /// Not by my table, or not now.
        Refused,
        /// Another change is under way.
        Busy,
        /// The version is not above this one.
        Outdated(Version),
        Places(Vec<Position>),
        /// Records, up to where they are all that there is, and whether who gives them lacks nothing there itself.
        Records(Vec<Copied>, Position, bool),
        Digests(Vec<u64>),
        Count(u64),
        /// All records of the first of the spans that were asked for, and how many spans these are. If one is too large for a message, it
        /// is none, and the records are those of the first span up to this place.
        All(Vec<Copied>, usize, Position),
    }

    /// What a replica has the others store.
    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub struct Push {
        pub from: String,
        pub to: String,
        pub version: Version,
        /// The addressee's incarnation and its time, in microseconds, as the sender last heard them: by these the addressee sees
        /// whether it is meant, and how late this comes.
        pub life: u64,
        pub echo: u64,
        pub stamp: u64,
        pub records: Vec<Copied>,
        /// What all replicas have by now: keys and stamps.
        pub settled: Vec<(ByteBuf, u64)>,
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub enum Pushed {
        /// By the one of this incarnation: when it starts again, it has nothing.
        Taken(u64),
        /// Not by my table, which is of this version, or too late.
        Refused(Option<Version>),
    }

    /// A push is refused when it comes this long after its sender last heard of the addressee: it may be older than a deletion whose
    /// tombstone is gone.
    pub const LATE: Duration = Duration::from_secs(5);
    /// How long a tombstone stays after all replicas have it: longer than anything may be on its way.
    const TOMBSTONE: Duration = Duration::from_secs(12);

    struct Tombstone {
        hash: u64,
        record: Record,
        /// When it was last looked at, and whether all replicas had it then.
        since: Duration,
        is_everywhere: bool,
    }
    /// How many tombstones are looked at in a round.
    const SWEEP: usize = 20_000;

    /// Who may answer for a key.
    #[derive(Debug, PartialEq)]
    pub enum Place {
        Here,
        Node(String),
        /// This node, once it has fetched the key from this source. The span is from the key on all that is incoming from there.
        Incoming(String, Version, Span),
        /// This node goes by no table yet, or cannot tell whether its table is still good.
        Unknown,
    }

    /// What a node has still to fetch of a span.
    #[derive(Clone, Debug)]
    struct Incoming {
        to: Position,
        groups: Vec<Group>,
    }

    /// The replicas that a shard had, which should all have the same.
    #[derive(Clone, Debug)]
    struct Group {
        /// Those that have not given what they have, yet.
        unheard: BTreeSet<String>,
        /// One of them that lacked nothing has given all, or is this node itself. With several replicas that will do to answer for a
        /// key; what only another one took, while the two were cut off from each other, comes later.
        is_covered: bool,
        /// The table names it. (Otherwise it is the other replicas of this shard, since this node has kept no records.)
        of_table: bool,
    }

    impl Incoming {
        /// Whether this node cannot answer for these keys yet: of some group it has no whole copy.
        fn blocks(&self) -> bool {
            self.groups.iter().any(|group| !group.is_covered)
        }

        fn is_from(&self, source: &str) -> bool {
            self.groups.iter().any(|group| group.unheard.contains(source))
        }

        fn sources(&self) -> impl Iterator<Item = &String> {
            self.groups.iter().flat_map(|group| &group.unheard)
        }
    }

    /// What a node last heard from another.
    #[derive(Default)]
    struct PeerInfo {
        version: Option<Version>,
        incarnation: u64,
        /// Its time, in microseconds.
        time: u64,
        /// When it last answered.
        answered: Duration,
        /// When it was last compared with.
        compared: Duration,
        /// Since when it has something else than this node, whenever it is heard.
        differs: Option<Duration>,
        /// It has started again, and goes by no table yet.
        is_blank: bool,
        /// It has still to fetch what is here: to compare would be to send everything twice.
        is_fetching: bool,
        silent: bool,
        /// When it was last its turn to be met.
        turn: Duration,
    }

    /// A node that has met nobody for this long was asleep, and meets others before it answers.
    const ASLEEP: Duration = Duration::from_millis(2500);
    /// A first table counts, and any other that none of its other nodes goes by, when each of them has been up for so many
    /// rounds, a second: whoever lives by a newer one has knocked at one of them by then. (Rounds and not time: nobody can
    /// knock at a node that sleeps.)
    const FIRST: u32 = 5;

    /// With how many bits of the name of the node that gave it a stamp ends. The rest will do until the year 2112.
    const NAME_BITS: u32 = 12;

    /// The lowest stamp of a moment.
    fn stamp_at(time: Duration) -> u64 {
        (time.as_micros() as u64) << NAME_BITS
    }

    /// How many spans are compared in one message.
    pub const MAX_SPANS: usize = 32;

    pub fn record_of_copy((stamp, bytes, context): &Copied) -> Option<(Record, Causal)> {
        // (The bytes are looked at before they are copied.)
        Some((Record::from_message(*stamp, bytes)?, context.clone()))
    }

    /// What other replicas of this shard may lack, as far as this one knows. A client that reads such a record here must not read
    /// an older one there: it is told by its causal context.
    ///
    /// The arrivals of records at this node are counted, and that count serves as a clock. What is always true: a replica with which
    /// this node has *agreed* at some count of arrivals has everything that had arrived by then; of what arrived later it can lack
    /// only records with an open note. With a replica that is not in `agreed` nothing is known: it may lack anything.
    #[derive(Default)]
    pub struct Agreement {
        /// How many records have come here, from clients and from other nodes.
        pub arrivals: u64,
        /// By key: the records that some replica may lack, and those whose writer had seen what some node may lack.
        notes: HashMap<Vec<u8>, Note>,
        /// How many notes there may be before they are thinned out.
        limit: usize,
        /// By replica, as long as it lives: the count of arrivals at which it had everything.
        agreed: BTreeMap<String, u64>,
        /// The count of arrivals at which all replicas had everything.
        everywhere: u64,
        /// An agreement at a lower count is of no use: not all that arrived since then was noted.
        least: u64,
        /// When an agreement was lost last.
        broken: Duration,
        /// By node of the store, a stamp: whatever that node knew of up to it, all replicas of its shard have. What is claimed once
        /// stays true.
        claims: BTreeMap<String, u64>,
        /// The lowest claim of all nodes of the table: all replicas of all shards have everything up to this stamp.
        floor: u64,
        /// By replica: the keys and stamps of settled records that it takes for open.
        settled: Vec<(String, Vec<(ByteBuf, u64)>)>,
        /// Somebody is about to tell them.
        is_telling: bool,
    }

    struct Note {
        stamp: u64,
        arrival: u64,
        is_tombstone: bool,
        /// Some replica may lack it, or what came before it: from the record with this stamp on.
        open_since: Option<u64>,
        /// What its writer had seen, as long as some node of the store may lack some of that, also when all replicas have this.
        context: Causal,
    }

    /// How many records that replicas may lack are kept in mind. If there are more, they are forgotten, and so are all agreements:
    /// then everything may be missing somewhere, until this node has compared with all other replicas.
    const MAX_NOTES: usize = 10_000;

    impl Agreement {
        /// Notes a record that came, which some replica may lack, and what its writer had seen.
        fn note(&mut self, record: &Record, mut context: Causal, now: Duration) {
            self.arrivals += 1;
            let (stamp, arrival, is_tombstone) = (record.stamp(), self.arrivals, record.is_tombstone());
            let before = self.notes.get(record.key()).and_then(|note| note.open_since);
            context.retain(|_, stamp| *stamp > self.floor);
            let open_since = Some(before.unwrap_or(stamp).min(stamp));
            self.notes.insert(record.key().to_vec(), Note { stamp, arrival, is_tombstone, open_since, context });
            if self.notes.len() > self.limit.max(MAX_NOTES) {
                // Tombstones stay, since no digest shows them, and contexts, since nobody else has them.
                self.notes.retain(|_, note| note.is_tombstone || !note.context.is_empty());
                self.notes.shrink_to_fit();
                self.limit = MAX_NOTES + 2 * self.notes.len();
                self.lose_all(now);
            }
        }

        /// Notes a record that was fetched with many others. This node agrees with nobody yet and has to compare with all, so it keeps
        /// in mind only what no comparison shows: tombstones and contexts.
        fn note_fetched(&mut self, record: &Record, context: Causal, now: Duration) {
            if record.is_tombstone() || !context.is_empty() {
                self.note(record, context, now);
            } else {
                self.arrivals += 1;
                self.notes.remove(record.key());
                self.lose_all(now);
            }
        }

        /// Notes that all replicas have a record.
        fn settle(&mut self, key: &[u8], stamp: u64) {
            if let Some(note) = self.notes.get_mut(key)
                && note.stamp <= stamp
            {
                note.open_since = None;
                if note.context.is_empty() {
                    self.notes.remove(key);
                }
            }
        }

        /// Notes that all replicas have a record that was written here. The others are to be told.
        fn settle_and_tell(&mut self, key: &[u8], stamp: u64, others: &[String]) {
            self.settle(key, stamp);
            for other in others {
                let news = (ByteBuf::from(key), stamp);
                match self.settled.iter_mut().find(|(to, _)| to == other) {
                    Some((_, list)) => list.push(news),
                    None => self.settled.push((other.clone(), vec![news])),
                }
            }
        }

        fn take_settled(&mut self, of: &str) -> Vec<(ByteBuf, u64)> {
            let index = self.settled.iter().position(|(to, _)| to == of);
            index.map_or(Vec::new(), |index| self.settled.swap_remove(index).1)
        }

        /// Whether somebody has to begin to tell the others what is settled.
        pub fn starts_telling(&mut self) -> bool {
            !self.settled.is_empty() && !std::mem::replace(&mut self.is_telling, true)
        }

        pub fn stops_telling(&mut self) {
            self.is_telling = false;
        }

        /// The replicas that are to be told of what is settled.
        pub fn to_tell(&self) -> Vec<String> {
            self.settled.iter().map(|(to, _)| to.clone()).collect()
        }

        fn note_of(&self, record: &Record) -> Option<&Note> {
            self.notes.get(record.key()).filter(|note| note.stamp == record.stamp())
        }

        fn is_open(&self, record: &Record) -> bool {
            self.note_of(record).is_some_and(|note| note.open_since.is_some())
        }

        fn context_of(&self, record: &Record) -> Causal {
            self.note_of(record).map_or(Causal::new(), |note| note.context.clone())
        }

        fn open(&self) -> impl Iterator<Item = (&Vec<u8>, &Note)> {
            self.notes.iter().filter(|(_, note)| note.open_since.is_some())
        }

        fn has_open_tombstones(&self) -> bool {
            self.open().any(|(_, note)| note.is_tombstone)
        }

        /// Notes that a replica has everything that had arrived here at a count of arrivals. What all `others` have is settled.
        fn agree(&mut self, with: &str, arrivals: u64, others: &[String]) {
            if arrivals < self.least {
                return;
            }
            let agreed = self.agreed.entry(with.to_owned()).or_default();
            *agreed = arrivals.max(*agreed);
            let least = others.iter().map(|other| self.agreed.get(other).copied().unwrap_or(0)).min();
            self.settle_up_to(least.unwrap_or(arrivals));
        }

        /// Notes that all replicas have what had arrived here at a count of arrivals.
        fn settle_up_to(&mut self, arrivals: u64) {
            if arrivals > self.everywhere {
                self.everywhere = arrivals;
                self.sweep();
            }
        }

        /// Drops the notes of what all replicas have, but for the contexts that are still needed.
        fn sweep(&mut self) {
            let (floor, everywhere) = (self.floor, self.everywhere);
            self.notes.retain(|_, note| {
                note.open_since = note.open_since.filter(|_| note.arrival > everywhere);
                note.context.retain(|_, stamp| *stamp > floor);
                note.open_since.is_some() || !note.context.is_empty()
            });
            if self.notes.len() < self.notes.capacity() / 8 {
                self.notes.shrink_to(100);
            }
        }

        fn agrees_with(&self, others: &[String]) -> bool {
            others.iter().all(|other| self.agreed.contains_key(other))
        }

        /// Forgets what a replica had: it has started again.
        fn lose(&mut self, other: &str, now: Duration) {
            if self.agreed.remove(other).is_some() {
                self.broken = now;
            }
        }

        fn lose_all(&mut self, now: Duration) {
            self.agreed.clear();
            (self.least, self.broken) = (self.arrivals, now);
        }

        /// Whether another replica may lack something that had arrived here at the count `by`.
        fn awaits(&self, other: &str, by: u64) -> bool {
            let Some(agreed) = self.agreed.get(other) else { return true };
            self.open().any(|(_, note)| note.arrival > *agreed && note.arrival <= by)
        }

        fn learn(&mut self, node: &str, claim: u64) {
            let known = self.claims.entry(node.to_owned()).or_default();
            *known = claim.max(*known);
        }
    }

    pub struct Node {
        /// Its own address; empty in a main instance, which has all keys.
        own: String,
        pub incarnation: u64,
        first_view: Vec<String>,
        first_factor: usize,
        /// How long a granted lock keeps off other coordinators. (It is remembered for longer. On this depends how soon another change
        /// succeeds, and never whether one is right.)
        pub lease: Duration,
        /// The time, since 1970, as of the last look. It never goes back.
        pub now: Duration,
        /// How often it has looked whether there is somebody to meet or to ask, and when it last asked.
        rounds: u32,
        is_asking: bool,
        asked: Duration,
        /// When the latest of the meetings began that have ended, answered or not. If that is long ago, this process slept.
        pub met: Duration,
        /// The highest stamp so far.
        clock: u64,
        pub records: Records,
        table: Option<Arc<Table>>,
        /// The shard that the table gives it.
        shard: Option<usize>,
        /// Every node has fetched what that table gives it: the sources in it mean nothing any more.
        complete: bool,
        /// By where they begin, the spans that this node owns and has not fetched: up to where, and from whom.
        incoming: BTreeMap<Position, Incoming>,
        /// It went by the table before this one as well, and has kept all that it had by that one.
        kept_records: bool,
        /// What it keeps for others is a whole copy. (It is not if this node has started again since that became theirs.)
        keeps_whole: bool,
        /// What some replica may lack.
        pub agreement: Agreement,
        tombstones: VecDeque<Tombstone>,
        /// A moment one or two seconds ago, and the count of arrivals then. What arrived later is no reason to compare: its writer is
        /// about to tell all others.
        marked: (Duration, u64),
        promises: Vec<Promise>,
        coordinated: Version,
        coordinating: bool,
        /// The newest lock that it ever granted, also if nothing came of that.
        newest_grant: Version,
        /// When this node last tried to settle a forgotten lock.
        resolved_locks: Duration,
        /// The newest table that a blank node has heard of, and who went by it then.
        heard: Option<(Table, BTreeSet<String>)>,
        peers: BTreeMap<String, PeerInfo>,
        /// Nodes that have shown to go by a newer table, and are to be asked for it.
        ahead: BTreeSet<String>,
        /// Who fetches from here: the incarnation that asked last.
        takers: BTreeMap<String, u64>,
        /// The sources that are being fetched from.
        fetching: BTreeSet<String>,
        /// How many keys these have still to give, once they have said.
        keys_left: BTreeMap<String, u64>,
        /// What an operator may want to know, to be printed.
        pub lines: Vec<String>,
        /// Records that nobody wants, to be dropped when the lock is gone: that may take seconds.
        pub garbage: Vec<Records>,
    }

    impl Node {
        pub fn new(own: String, first_view: Vec<String>, first_factor: usize, incarnation: u64, now: Duration) -> Node {
            Node {
                lease: Duration::from_secs(10),
                own,
                incarnation,
                first_view,
                first_factor,
                now,
                rounds: 0,
                is_asking: false,
                asked: Duration::ZERO,
                met: now,
                clock: 0,
                records: Records::default(),
                table: None,
                shard: None,
                complete: false,
                incoming: BTreeMap::new(),
                kept_records: false,
                keeps_whole: false,
                agreement: Agreement::default(),
                tombstones: VecDeque::new(),
                marked: (now, 0),
                promises: Vec::new(),
                coordinated: Version::default(),
                coordinating: false,
                newest_grant: Version::default(),
                resolved_locks: now,
                heard: None,
                peers: BTreeMap::new(),
                ahead: BTreeSet::new(),
                takers: BTreeMap::new(),
                fetching: BTreeSet::new(),
                keys_left: BTreeMap::new(),
                lines: Vec::new(),
                garbage: Vec::new(),
            }
        }

        // -- Who has a key

        /// Answers the question of the whole program: who may answer for a key now? `hash` is that of the key.
        pub fn place(&self, hash: u64, key: &[u8]) -> Place {
            if self.own.is_empty() {
                return Place::Here;
            } else if !self.may_answer() {
                return Place::Unknown;
            }
            self.place_by_table(hash, key)
        }

        /// Who may answer for a key, by the table alone: also if this node slept, and others may know better.
        pub fn place_by_table(&self, hash: u64, key: &[u8]) -> Place {
            let Some(table) = self.table.as_ref().filter(|_| !self.is_joining()) else { return Place::Unknown };
            let shard = table.shard_at(hash, key);
            if Some(shard) != self.shard {
                return Place::Node(self.pick(table.nodes_of(shard), hash));
            } else if self.incoming.is_empty() {
                return Place::Here;
            }
            let position = (hash, key.to_vec());
            match self.incoming.range(..=&position).next_back() {
                Some((_, incoming)) if position < incoming.to && incoming.blocks() => {
                    let missing =
                        incoming.groups.iter().filter(|group| !group.is_covered).flat_map(|group| &group.unheard);
                    let source = self.pick(missing, 0);
                    Place::Incoming(source, table.version, Span { from: position, to: incoming.to.clone() })
                }
                _ => Place::Here,
            }
        }

        /// One of some nodes: of those that are neither silent nor blank, if there are such. The same for the same key.
        fn pick<'a>(&self, nodes: impl Iterator<Item = &'a String> + Clone, hash: u64) -> String {
            let speaks = |node: &&String| !self.peers.get(*node).is_some_and(|peer| peer.silent || peer.is_blank);
            let (all, speaking) = (nodes.clone().count(), nodes.clone().filter(speaks).count());
            let index = hash as usize % if speaking > 0 { speaking } else { all.max(1) };
            let mut among = nodes.filter(|node| speaking == 0 || speaks(node));
            among.nth(index).cloned().unwrap_or_default()
        }

        pub fn is_silent(&self, node: &str) -> bool {
            self.peers.get(node).is_some_and(|peer| peer.silent)
        }

        /// Whether this node may go by its table. One that slept meets others first (that is a courtesy to whoever has removed
        /// it by force; nothing else depends on it). A store of one that is asked to join another takes no more keys.
        pub fn may_answer(&self) -> bool {
            self.own.is_empty() || self.table.is_some() && self.now < self.met + ASLEEP && !self.is_joining()
        }

        fn is_joining(&self) -> bool {
            let alone = self.table.as_ref().is_some_and(|table| table.view == [self.own.as_str()]);
            alone && self.promises.iter().any(|promise| promise.version.coordinator != self.incarnation)
        }

        /// Stamps and stores a record that is a client's. Returns what was there before.
        pub fn put(&mut self, hash: u64, record: &mut Record) -> Option<Record> {
            // A record of a clock far ahead may have come while this one's was set back.
            let before = self.records.get(hash, record.key()).map_or(0, Record::stamp);
            self.clock = self.clock.max(before);
            record.set_stamp(self.stamp());
            self.keep(hash, record.clone())
        }

        fn keep(&mut self, hash: u64, record: Record) -> Option<Record> {
            if record.is_tombstone() {
                let (record, since) = (record.clone(), self.now);
                self.tombstones.push_back(Tombstone { hash, record, since, is_everywhere: false });
            }
            self.records.insert(hash, record)
        }

        /// Sees to it that what is written next gets a higher stamp than anything that a client's context knows of.
        pub fn know(&mut self, context: &Causal) {
            self.clock = context.values().fold(self.clock, |clock, stamp| clock.max(*stamp));
        }

        /// The highest stamp that a client's context may have: one that no clock of ours can have given is forged.
        pub fn latest(&self) -> u64 {
            self.clock.max(stamp_at(self.now + Duration::from_secs(86_400)))
        }

        /// Notes a record that was written here, and what its writer had seen.
        pub fn note_write(&mut self, record: &Record, context: Causal) {
            self.agreement.note(record, context, self.now);
        }

        /// A hybrid logical clock (Kulkarni et al. 2014): microseconds that only go up, past each stamp that was met, and
        /// below them some bits of the node's name, so that hardly ever two nodes make the same.
        fn stamp(&mut self) -> u64 {
            const NAME: u64 = (1 << NAME_BITS) - 1;
            let time = stamp_at(self.now);
            self.clock = time.max(self.clock.saturating_add(NAME + 1)) & !NAME | hash_of(self.own.as_bytes()) & NAME;
            self.clock
        }

        /// Whether this node gave a stamp, for the simulation.
        #[cfg(test)]
        pub fn has_given(&self, stamp: u64) -> bool {
            (stamp ^ hash_of(self.own.as_bytes())) & ((1 << NAME_BITS) - 1) == 0
        }

        // -- What it tells, and what it hears

        pub fn status(&self) -> Status {
            Status {
                incarnation: self.incarnation,
                version: self.version(),
                store: self.store(),
                complete: self.complete,
                is_member: self.table.as_ref().is_some_and(|table| table.lists(&self.own)),
                members: self.table.as_ref().map_or(0, |table| table.view.len()),
                keys: self.keys(),
                incoming: self.incoming_sources().into_iter().collect(),
                waits_for: self.waits_for(),
                coordinated: self.coordinated,
                coordinating: self.coordinating,
                promises: self.promises.clone(),
                first_view: self.first_view.clone(),
                factor: self.first_factor,
                rounds: self.rounds,
                time: self.now.as_micros() as u64,
                stamp: self.clock,
                digest: self.has_all().then(|| self.records.digest()),
                claims: if self.is_replicated() { self.agreement.claims.clone() } else { BTreeMap::new() },
                table: None,
                tellers: self.heard.as_ref().map_or_else(|| set_of([self.own.clone()]), |(_, tellers)| tellers.clone()),
            }
        }

        pub fn compose(&self, to: &str, message: Message) -> Envelope {
            Envelope { from: self.own.clone(), to: to.to_owned(), status: self.status(), message }
        }

        /// The table that one who goes by this version is to be shown, if any. A blank node tells only blank ones what it has
        /// heard of: that table may be lost with all its nodes.
        fn table_for(&self, version: Option<Version>) -> Option<Table> {
            let heard = self.heard.as_ref().map(|(table, _)| table).filter(|_| version.is_none());
            self.table.as_deref().or(heard).filter(|table| version < Some(table.version)).cloned()
        }

        /// Answers a message.
        pub fn receive(&mut self, envelope: Envelope) -> (Status, Reply) {
            let Envelope { from, status, message, .. } = envelope;
            let (theirs, life) = (status.version, status.incarnation);
            // A lock is granted by what this node knew before it heard its coordinator.
            let granted = match &message {
                Message::Lock(version, nodes, void) => self.grant(*version, status.store, &from, nodes.clone(), void),
                _ => Reply::Refused,
            };
            if theirs > self.version() {
                self.ahead.insert(from.clone());
            }
            self.hear(&from, Status { table: None, ..status }, false);
            let reply = if let Message::Lock(..) = message { granted } else { self.reply_to(from, life, message) };
            (Status { table: self.table_for(theirs), ..self.status() }, reply)
        }

        /// Replies to what a node says in this life of it.
        fn reply_to(&mut self, from: String, life: u64, message: Message) -> Reply {
            let goes_by = |version| self.version() == Some(version);
            match message {
                Message::Meet => Reply::Done,
                // Not if it has started again since it granted the lock, and now has nothing.
                Message::Cut(version, counts, complete) if self.has_granted(version) => {
                    if complete && self.is_replicated() {
                        self.set_complete();
                    }
                    let spans = self.counted_spans();
                    let place = |count: &usize| self.records.nth_highest((*count).max(1), &spans);
                    Reply::Places(counts.iter().take(1000).map(place).collect())
                }
                // Not if it was fetched in an earlier life of the taker, which now has nothing.
                Message::Forget(version, span)
                    if self.gives(version, &span) && self.takers.get(&from) == Some(&life) =>
                {
                    self.forget(&span);
                    Reply::Done
                }
                Message::Give(version, span, limit)
                    if self.gives(version, &span) || goes_by(version) && self.is_replica(&from) =>
                {
                    self.takers.insert(from, life);
                    let (records, to) = self.records.first_of(&span, limit.min(MAX_BATCH));
                    let is_whole = self.lacks_nothing_of(&span);
                    Reply::Records(records.iter().map(|record| self.copy_of(record)).collect(), to, is_whole)
                }
                Message::Count(version, spans) if goes_by(version) && spans.len() <= MAX_SPANS => {
                    Reply::Count(spans.iter().map(|span| self.records.count_of(span) as u64).sum())
                }
                Message::Digests(version, spans) if goes_by(version) && spans.len() <= MAX_SPANS => {
                    Reply::Digests(self.records.digests_of(&spans))
                }
                Message::GiveAll(version, spans, _) if goes_by(version) && spans.len() <= MAX_SPANS => {
                    self.give_all(&spans)
                }
                _ => Reply::Refused,
            }
        }

        /// All records of the first of some spans, of as many as fit into a message; or of a part of the first span.
        fn give_all(&self, spans: &[Span]) -> Reply {
            let (mut copies, mut count, mut bytes) = (Vec::new(), 0, 0);
            for records in self.records.all_of(spans, MAX_BATCH) {
                bytes += records.iter().map(|record| record.value().len() + 64).sum::<usize>();
                if bytes > 2 * MAX_BATCH {
                    break;
                }
                copies.extend(records.iter().map(|record| self.copy_of(record)));
                count += 1;
            }
            match spans.first().filter(|_| count == 0) {
                None => Reply::All(copies, count, Position::default()),
                Some(first) => {
                    let (records, to) = self.records.first_of(first, MAX_BATCH);
                    Reply::All(records.iter().map(|record| self.copy_of(record)).collect(), 0, to)
                }
            }
        }

        /// Whether this node may give, or forget, a span: it goes by this very table, and the span is others'.
        fn gives(&self, version: Version, span: &Span) -> bool {
            self.table.as_ref().is_some_and(|table| {
                table.version == version
                    && !table.spans().any(|(other, range)| Some(range.shard) == self.shard && other.overlaps(span))
            })
        }

        /// A record as it goes to another node.
        pub fn copy_of(&self, record: &Record) -> Copied {
            let (stamp, bytes) = record.to_message();
            (stamp, bytes, self.agreement.context_of(record))
        }

        /// Whether this node lacks nothing of a span, so that a copy of what it has suffices to answer for it.
        fn lacks_nothing_of(&self, span: &Span) -> bool {
            let is_own = self.own_spans().iter().any(|own| own.overlaps(span));
            if is_own { !self.incoming_in(span).any(|(_, it)| it.blocks()) } else { self.keeps_whole }
        }

        /// Takes in what another node tells of itself, in an answer or in what it says.
        pub fn hear(&mut self, from: &str, status: Status, has_answered: bool) {
            self.clock = self.clock.max(status.stamp);
            status.claims.iter().for_each(|(node, claim)| self.agreement.learn(node, *claim));
            self.note_peer(from, &status, has_answered);
            // What its coordinator does not pursue any more, and does not go by, will never be a table.
            self.promises.retain(|promise| {
                let pursued = promise.version > status.coordinated
                    || promise.version == status.coordinated && status.coordinating;
                promise.version.coordinator != status.incarnation || pursued || status.version >= Some(promise.version)
            });
            if let Some(table) = status.table.filter(Table::is_valid) {
                self.consider(from, status.tellers, status.incarnation, table);
            }
            if status.complete && status.version == self.version() {
                self.set_complete();
            }
            if let Some(digest) = status.digest
                && status.version == self.version()
            {
                self.note_digest(from, digest);
            }
        }

        fn note_peer(&mut self, from: &str, status: &Status, has_answered: bool) {
            let peer = self.peers.entry(from.to_owned()).or_default();
            peer.version = status.version;
            let is_new = std::mem::replace(&mut peer.incarnation, status.incarnation) != status.incarnation;
            peer.is_blank = status.version.is_none();
            peer.is_fetching = !status.waits_for.is_empty();
            peer.time = if is_new { status.time } else { peer.time.max(status.time) };
            if has_answered {
                peer.answered = self.now;
            }
            // Who speaks may still not hear (the network may be cut in one direction); but one that started again will.
            if peer.silent && (has_answered || is_new) {
                (peer.silent, peer.compared) = (false, Duration::ZERO);
                self.lines.push(format!("{from} is back"));
            }
            if is_new {
                self.agreement.lose(from, self.now);
            }
        }

        /// Compares what another replica has, by its digest, with what is here.
        fn note_digest(&mut self, from: &str, digest: u64) {
            if !self.has_all() || !self.is_replica(from) {
                return;
            }
            let differs = digest != self.records.digest();
            let peer = self.peers.entry(from.to_owned()).or_default();
            peer.differs = if differs { peer.differs.or(Some(self.now)) } else { None };
            let others = self.others();
            // Who has the same as this node has all that it has. (But no digest shows tombstones: so only if none is open, and those
            // of before are known to be there.)
            if !differs && self.agreement.agreed.contains_key(from) && !self.agreement.has_open_tombstones() {
                self.agreement.agree(from, self.agreement.arrivals, &others);
            }
        }

        /// Notes that a node did not answer what was said to this life of it.
        pub fn note_silence(&mut self, of: &str, incarnation: u64) {
            let peer = self.peers.entry(of.to_owned()).or_default();
            if peer.incarnation != incarnation {
                return;
            }
            peer.version = None;
            if !std::mem::replace(&mut peer.silent, true) {
                self.lines.push(format!("{of} is silent"));
            }
        }

        // -- Which table it goes by

        pub fn version(&self) -> Option<Version> {
            self.table.as_ref().map(|table| table.version)
        }

        pub fn table(&self) -> Option<Arc<Table>> {
            self.table.clone()
        }

        pub fn store(&self) -> Option<u64> {
            self.table.as_ref().map(|table| table.store)
        }

        pub fn is_complete(&self) -> bool {
            self.complete
        }

        pub fn own(&self) -> &str {
            &self.own
        }

        pub fn shard(&self) -> Option<usize> {
            self.shard
        }

        /// Looks at a table that another node sent. It is adopted if it is newer, concerns this node, and no other coordinator's lock
        /// forbids it. A blank node keeps it in mind until enough others go by it (`let_in`).
        fn consider(&mut self, from: &str, tellers: BTreeSet<String>, incarnation: u64, table: Table) {
            let Some(mine) = &self.table else { return self.consider_blank(from, tellers, table) };
            let concerns = table.store == mine.store || self.may_change_store(mine, &table, from);
            // A lock binds: its coordinator counts on what this node told it. It may itself bring a table from before its
            // lock, since it asks again. (One that has no keys, and gets none, cannot do harm.)
            let matters = mine.lists(&self.own) || table.lists(&self.own);
            let forbids = |promise: &Promise| {
                promise.version > table.version
                    && ![incarnation, self.incarnation].contains(&promise.version.coordinator)
            };
            let is_forbidden = matters && self.promises.iter().any(forbids);
            if concerns && table.version > mine.version && !is_forbidden {
                self.adopt(table);
            } else if !concerns {
                // The locks of that store have come to tables, and to nothing here.
                let is_void = |it: &Promise| it.store == Some(table.store) && it.version <= table.version;
                self.promises.retain(|promise| !is_void(promise));
            }
        }

        /// Whether this node may go over to another store: only where it leaves nobody.
        fn may_change_store(&self, mine: &Table, table: &Table, from: &str) -> bool {
            let has_left = !mine.lists(&self.own);
            let is_free = has_left || mine.view == [self.own.as_str()] || self.has_granted(table.version);
            is_free && self.is_named_in(table) || has_left && mine.lists(from)
        }

        /// Whether this life of the node granted the lock under which a table was made.
        fn has_granted(&self, version: Version) -> bool {
            self.promises.iter().any(|promise| promise.version == version && promise.granted > Duration::ZERO)
        }

        /// Whether a table has this node as a member, or as a source that has nothing to lose.
        fn is_named_in(&self, table: &Table) -> bool {
            table.lists(&self.own) || self.records.is_empty() && table.sources().contains(&self.own)
        }

        /// Looks at a table that another node sent to this blank one.
        fn consider_blank(&mut self, from: &str, tellers: BTreeSet<String>, table: Table) {
            // A table that does not name this node, told by one that its VIEW does not name, is another store's.
            let is_known = self.heard.as_ref().is_some_and(|(heard, _)| heard.store == table.store);
            let is_ours = is_known || self.is_named_in(&table) || self.first_view.iter().any(|node| node == from);
            if table.lists(&self.own) && self.has_granted(table.version) {
                self.adopt(table);
            } else if is_ours {
                match &mut self.heard {
                    Some((heard, known)) if heard.version == table.version => known.extend(tellers),
                    Some((heard, _)) if heard.version > table.version => {}
                    heard => *heard = Some((table, tellers)),
                }
            }
        }

        /// Goes by a table from now on: one step, after which this node answers for no key that it gives to others.
        fn adopt(&mut self, table: Table) {
            let named = table.lists(&self.own) || table.sources().contains(&self.own);
            // Who did not go by the table before this one was left out: what it has is not what the others count on.
            let is_successor = self.version().is_none_or(|version| version == table.base);
            let keeps = named && is_successor;
            if !keeps && !self.records.is_empty() {
                self.garbage.push(std::mem::take(&mut self.records));
            }
            // (One that started blank, and has not fetched everything from another replica, still has to.)
            let is_filling = self.incoming.values().flat_map(|it| &it.groups).any(|it| !it.of_table && !it.is_covered);
            self.kept_records = keeps && self.table.is_some() && !is_filling;
            self.keeps_whole = self.kept_records && (self.keeps_whole || self.complete);
            self.shard = table.shard_of(&self.own);
            self.incoming = self.incoming_by(&table);
            // The replicas may be others, and what they have is to be found out.
            self.agreement.lose_all(self.now);
            self.agreement.settled.clear();
            self.promises.retain(|promise| promise.version > table.version);
            self.lines.push(self.line_about(&table));
            self.complete = table.sources().is_empty();
            self.takers.clear();
            self.fetching.clear();
            self.keys_left.clear();
            self.heard = None;
            self.table = Some(Arc::new(table));
        }

        /// Tells an operator of the table that is just being adopted.
        fn line_about(&self, table: &Table) -> String {
            let is_source = |range: &&Range| range.sources.iter().flatten().any(|source| *source == self.own);
            let given = table.ranges.iter().filter(is_source);
            let gives = set_of(given.flat_map(|range| table.replicas(range.shard)));
            let gives: Vec<String> = gives.into_iter().filter(|node| *node != self.own).collect();
            let list = |nodes: Vec<String>| if nodes.is_empty() { "nobody".to_owned() } else { nodes.join(", ") };
            let gains = list(self.incoming_sources().into_iter().collect());
            let (version, count, gives) = (table.version, table.view.len(), list(gives));
            format!("table {version} of {count} nodes: fetches from {gains}, gives to {gives}")
        }

        /// What this node has to fetch by a table.
        fn incoming_by(&self, table: &Table) -> BTreeMap<Position, Incoming> {
            let mut incoming = BTreeMap::new();
            for (span, range) in table.spans().filter(|(_, range)| Some(range.shard) == self.shard) {
                let has_it = |group: &Vec<String>| self.keeps_whole && table.factor > 1 && group.contains(&self.own);
                let of_table = |group: &Vec<String>| (group.clone(), has_it(group), true);
                let mut named: Vec<(Vec<String>, bool, bool)> = range.sources.iter().map(of_table).collect();
                if !self.kept_records {
                    named.push((table.replicas(range.shard), false, false));
                }
                let group = |(nodes, is_covered, of_table): (Vec<String>, bool, bool)| Group {
                    unheard: set_of(nodes.into_iter().filter(|node| *node != self.own)),
                    is_covered,
                    of_table,
                };
                let groups: Vec<Group> = named.into_iter().map(group).filter(|it| !it.unheard.is_empty()).collect();
                if !groups.is_empty() {
                    incoming.insert(span.from, Incoming { to: span.to, groups });
                }
            }
            incoming
        }

        /// Notes that all nodes have fetched what the table gives them. Once true it stays true, also for one that starts
        /// again. What this node kept for others it drops.
        pub fn set_complete(&mut self) {
            if std::mem::replace(&mut self.complete, true) {
                return;
            }
            self.retain_groups(|group| !group.of_table);
            let (Some(table), own) = (self.table.clone(), self.shard) else { return };
            for (span, _) in table.spans().filter(|(_, range)| Some(range.shard) != own) {
                self.forget(&span);
            }
        }

        fn forget(&mut self, span: &Span) {
            let forgotten = self.records.forget(span);
            if !forgotten.is_empty() {
                self.garbage.push(forgotten);
            }
        }

        /// Whether it is this node's turn to find out whether the table is complete.
        pub fn is_to_finish(&self) -> bool {
            let Some(table) = self.table.as_ref().filter(|_| !self.complete && self.incoming.is_empty()) else {
                return false;
            };
            let turn = (self.rounds / 16) as usize % table.view.len();
            self.rounds.is_multiple_of(16) && table.view[turn] == self.own
        }

        fn retain_groups(&mut self, keep: impl Fn(&Group) -> bool) {
            self.incoming.retain(|_, incoming| {
                incoming.groups.retain(&keep);
                !incoming.groups.is_empty()
            });
        }

        // -- Several replicas

        /// Whether its table has several replicas of a shard.
        pub fn is_replicated(&self) -> bool {
            self.table.as_ref().is_some_and(|table| table.factor > 1)
        }

        /// The other replicas of its shard.
        pub fn others(&self) -> Vec<String> {
            let (Some(table), Some(shard)) = (&self.table, self.shard) else { return Vec::new() };
            table.replicas(shard).into_iter().filter(|node| *node != self.own).collect()
        }

        fn is_replica(&self, node: &str) -> bool {
            self.others().iter().any(|other| other == node)
        }

        pub fn own_spans(&self) -> Vec<Span> {
            let Some(table) = &self.table else { return Vec::new() };
            table.spans().filter(|(_, range)| Some(range.shard) == self.shard).map(|(span, _)| span).collect()
        }

        /// How many keys this node has; with several replicas without those that it keeps for others.
        pub fn keys(&self) -> usize {
            match self.keeps_some_for_others() {
                true => self.own_spans().iter().map(|span| self.records.count_of(span)).sum(),
                false => self.records.len(),
            }
        }

        /// The spans whose keys `keys` counts.
        fn counted_spans(&self) -> Vec<Span> {
            match self.keeps_some_for_others() {
                true => self.own_spans(),
                false => vec![Span::all()],
            }
        }

        fn keeps_some_for_others(&self) -> bool {
            self.is_replicated() && !self.complete
        }

        /// Who else is to have a record of a key now, by which table; without the silent, and those that have it (by their
        /// incarnations). None if this node goes by no table.
        pub fn lacking(&self, hash: u64, key: &[u8], having: &BTreeMap<String, u64>) -> Option<(Version, Vec<String>)> {
            let table = self.table.as_ref()?;
            let has_it = |node: &String| having.get(node) == Some(&self.incarnation_of(node));
            let lacks = |node: &String| *node != self.own && !has_it(node) && !self.is_silent(node);
            // Where there is one replica now, it fetches the record from here, and may have deleted it since.
            let replicas = if table.factor > 1 { table.replicas(table.shard_at(hash, key)) } else { Vec::new() };
            Some((table.version, replicas.into_iter().filter(lacks).collect()))
        }

        /// A node of a key's shard that was not asked yet, if one is left: of those that are not silent, if there are such.
        pub fn another(&self, hash: u64, key: &[u8], asked: &[String]) -> Option<String> {
            let table = self.table.as_ref().filter(|_| self.is_replicated())?;
            let is_left = |node: &&String| **node != self.own && !asked.contains(node);
            let left = table.nodes_of(table.shard_at(hash, key)).filter(is_left);
            left.clone().next().is_some().then(|| self.pick(left, hash))
        }

        pub fn compose_push(&mut self, to: &str, version: Version, records: Vec<Copied>) -> Push {
            let settled = self.agreement.take_settled(to);
            let (life, echo) = self.peers.get(to).map_or((0, 0), |peer| (peer.incarnation, peer.time));
            let (from, to, stamp) = (self.own.clone(), to.to_owned(), self.clock);
            Push { from, to, version, life, echo, stamp, records, settled }
        }

        /// Stores what another replica wrote.
        pub fn take_push(&mut self, push: Push) -> Pushed {
            self.clock = self.clock.max(push.stamp);
            let time = self.now.as_micros() as u64;
            let version = self.version();
            let refused = Pushed::Refused(version);
            let is_late = push.life != self.incarnation || push.echo.saturating_add(LATE.as_micros() as u64) < time;
            let records: Option<Vec<(Record, Causal)>> = push.records.iter().map(record_of_copy).collect();
            let (Some(table), Some(records)) = (self.table.clone(), records) else { return refused };
            let is_mine = |record: &Record| Some(table.shard_at(hash_of(record.key()), record.key())) == self.shard;
            if Some(push.version) > version && port_of(&push.from).is_some() {
                self.ahead.insert(push.from.clone());
            }
            if Some(push.version) != version
                || is_late && !records.is_empty()
                || !records.iter().all(|(record, _)| is_mine(record))
            {
                return refused;
            }
            for (record, context) in records {
                // A third replica may lack it until the writer says that it does not.
                self.take(record, context);
            }
            for (key, stamp) in push.settled {
                self.agreement.settle(&key, stamp);
            }
            Pushed::Taken(self.incarnation)
        }

        /// Stores a record that another node has, if it beats the one that is here.
        pub fn take(&mut self, record: Record, context: Causal) {
            self.take_in(record, context, Agreement::note);
        }

        fn take_in(&mut self, record: Record, context: Causal, note: fn(&mut Agreement, &Record, Causal, Duration)) {
            let hash = hash_of(record.key());
            self.clock = self.clock.max(record.stamp());
            if self.records.get(hash, record.key()).is_none_or(|known| record.beats(known)) {
                if self.is_replicated() {
                    note(&mut self.agreement, &record, context, self.now);
                }
                self.keep(hash, record);
            }
        }

        pub fn incarnation_of(&self, node: &str) -> u64 {
            self.peers.get(node).map_or(0, |peer| peer.incarnation)
        }

        /// Notes that another replica, in this life of it, has all that had arrived here at this count of arrivals.
        pub fn agree(&mut self, with: &str, life: u64, arrivals: u64) {
            let others = self.others();
            if self.incarnation_of(with) == life {
                self.agreement.agree(with, arrivals, &others);
            }
        }

        /// Notes who has a record that was written here. If that is every replica, nobody lacks it.
        pub fn written(&mut self, record: &Record, having: &BTreeMap<String, u64>) {
            let others = self.others();
            if others.iter().all(|other| having.get(other) == Some(&self.incarnation_of(other))) {
                self.agreement.settle_and_tell(record.key(), record.stamp(), &others);
            }
        }

        /// The tombstones that some replica may lack.
        pub fn open_tombstones(&self) -> Vec<Copied> {
            let open = self.agreement.open().filter(|(_, note)| note.is_tombstone);
            open.filter_map(|(key, _)| Some(self.copy_of(self.records.get(hash_of(key), key)?))).collect()
        }

        /// Which other nodes may have something of a span of this shard that is not here.
        pub fn who_may_have(&self, span: &Span) -> Vec<String> {
            let sources = self.incoming_in(span).flat_map(|(_, incoming)| incoming.sources());
            set_of(sources.cloned().chain(self.others())).into_iter().collect()
        }

        /// Whether a key cannot be answered for here without this source.
        pub fn still_needs(&self, hash: u64, key: &[u8], source: &str) -> bool {
            matches!(self.place_by_table(hash, key), Place::Incoming(needed, ..) if needed == source)
        }

        /// Whether to compare with another node now, which was just met; at most once a second with each.
        pub fn is_to_compare(&mut self, with: &str) -> bool {
            let (version, now) = (self.version(), self.now);
            let awaits = self.agreement.awaits(with, self.marked.1);
            if !self.is_replica(with) || self.incoming.values().any(Incoming::blocks) {
                return false;
            }
            let peer = self.peers.entry(with.to_owned()).or_default();
            // Whoever has what the other one lacks compares at once. That something differs is the rule while clients write.
            let differs = peer.differs.is_some_and(|since| since + Duration::from_secs(2) < now);
            let pause = Duration::from_secs(if awaits { 1 } else { 5 });
            let due = (awaits || differs)
                && peer.version == version
                && !peer.silent
                && !peer.is_fetching
                && peer.compared + pause < now;
            if due {
                peer.compared = now;
            }
            due
        }

        /// Whether what is here of a key is as new as a context asks for.
        pub fn satisfies(&self, hash: u64, key: &[u8], context: &Causal) -> bool {
            let wanted = str::from_utf8(key).ok().and_then(|key| context.get(key)).copied().unwrap_or(0);
            wanted <= self.agreement.floor || self.records.get(hash, key).map_or(0, Record::stamp) >= wanted
        }

        /// A client's context after it wrote or read a record here.
        pub fn context_after(&self, mut context: Causal, hash: u64, key: &[u8]) -> Causal {
            let Some(table) = self.table.as_ref().filter(|_| self.is_replicated()) else { return Causal::new() };
            if let (Some(record), Ok(name)) = (self.records.get(hash, key), str::from_utf8(key)) {
                let seen = self.agreement.context_of(record).into_iter().chain([(name.to_owned(), record.stamp())]);
                for (key, stamp) in seen {
                    let known = context.entry(key).or_default();
                    *known = stamp.max(*known);
                }
            }
            let is_settled = |key: &str, stamp: u64| {
                let hash = hash_of(key.as_bytes());
                let own = Some(table.shard_at(hash, key.as_bytes())) == self.shard;
                let known = self.records.get(hash, key.as_bytes()).filter(|_| own);
                known.is_some_and(|record| record.stamp() >= stamp && !self.may_lack(record))
            };
            context.retain(|key, stamp| *stamp > self.agreement.floor && !is_settled(key, *stamp));
            context
        }

        /// Whether some replica may not have a record of this node's shard. While the table is not complete, a former one may not
        /// have heard of it and go on answering.
        fn may_lack(&self, record: &Record) -> bool {
            let agrees = self.complete && self.agreement.agrees_with(&self.others());
            record.stamp() > self.agreement.floor && (!agrees || self.agreement.is_open(record))
        }

        /// Whether this node is one of several replicas and lacks nothing, as far as it knows.
        fn has_all(&self) -> bool {
            self.is_replicated() && self.complete && self.incoming.is_empty()
        }

        /// Whether the record of a key is open although no replica is silent: its writer is probably about to tell that all have it.
        pub fn is_settling(&self, hash: u64, key: &[u8]) -> bool {
            let is_open = self.records.get(hash, key).is_some_and(|record| self.agreement.is_open(record));
            is_open && self.others().iter().all(|other| !self.is_silent(other))
        }

        /// Drops what is not needed any more of what was kept for other replicas. To be done several times a second.
        pub fn sweep(&mut self) {
            if self.marked.0 + Duration::from_secs(1) < self.now {
                self.marked = (self.now, self.agreement.arrivals);
            }
            self.claim();
            self.sweep_tombstones();
        }

        /// Finds out up to which stamp all replicas have everything, here and everywhere.
        fn claim(&mut self) {
            let others = self.others();
            if self.has_all() && others.is_empty() {
                // There is nobody who could lack anything.
                self.agreement.settle_up_to(self.agreement.arrivals);
            }
            let agreement = &self.agreement;
            if self.has_all() && agreement.agrees_with(&others) {
                // All that is still to come is above this.
                let clock = self.clock.max(stamp_at(self.now));
                let lowest = agreement.open().filter_map(|(_, note)| note.open_since).min().unwrap_or(clock);
                self.agreement.learn(&self.own, lowest.min(clock) - 1);
            }
            let claim = |node: &String| self.agreement.claims.get(node).copied().unwrap_or(0);
            let lowest = self.table.as_ref().and_then(|table| table.view.iter().map(claim).min());
            if lowest > Some(self.agreement.floor) {
                self.agreement.floor = lowest.unwrap_or(0);
                self.agreement.sweep();
            }
        }

        /// Drops the tombstones that all replicas have had at one time, long enough ago that nothing older can still be on its
        /// way. Each was pushed to all of them, since a comparison begins with the tombstones that one may lack; who started
        /// again has fetched it with the rest, or has to be compared with anew.
        fn sweep_tombstones(&mut self) {
            let peers = self.others();
            let answered = |node: &String| self.peers.get(node).map_or(Duration::ZERO, |peer| peer.answered);
            let answered = peers.iter().map(answered).min().unwrap_or(self.now);
            if self.tombstones.len() < self.tombstones.capacity() / 8 {
                self.tombstones.shrink_to(100);
            }
            for _ in 0..self.tombstones.len().min(SWEEP) {
                let Some(mut it) = self.tombstones.pop_front() else { return };
                if it.since + TOMBSTONE > self.now {
                    return self.tombstones.push_front(it);
                } else if self.records.get(it.hash, it.record.key()).is_none_or(|now| now.stamp() != it.record.stamp())
                {
                    continue;
                }
                // Every other replica has answered since the last look, and none has started again: that would have cost an agreement.
                let is_unbroken = self.agreement.broken < it.since && answered >= it.since;
                if it.is_everywhere && is_unbroken {
                    self.records.remove(it.hash, it.record.key());
                    continue;
                }
                let is_needed = self.may_lack(&it.record) || !self.incoming.is_empty();
                it.is_everywhere = !is_needed && self.agreement.context_of(&it.record).is_empty();
                it.since = self.now;
                self.tombstones.push_back(it);
            }
        }

        // -- Fetching

        fn incoming_sources(&self) -> BTreeSet<String> {
            set_of(self.incoming.values().flat_map(Incoming::sources).cloned())
        }

        /// The groups of which one must be heard before this node can answer for all its keys.
        fn waits_for(&self) -> Vec<Vec<String>> {
            let mut groups = Vec::new();
            for group in self.incoming.values().flat_map(|it| &it.groups).filter(|group| !group.is_covered) {
                let left = group.unheard.iter().cloned().collect();
                if !groups.contains(&left) {
                    groups.push(left);
                }
            }
            groups
        }

        /// The incoming spans that have something of this one.
        fn incoming_in(&self, span: &Span) -> impl Iterator<Item = (Span, &Incoming)> {
            let spans = self.incoming.iter().map(|(from, it)| (Span { from: from.clone(), to: it.to.clone() }, it));
            spans.filter(|(other, _)| other.overlaps(span))
        }

        /// The sources that this node does not fetch from yet; from now on it does. Of a group of which one is enough, one at a time.
        pub fn sources_to_fetch_from(&mut self) -> Vec<String> {
            let mut sources = BTreeSet::new();
            for group in self.incoming.values().flat_map(|incoming| &incoming.groups) {
                match group.of_table {
                    true => sources.extend(group.unheard.iter().cloned()),
                    false => drop(sources.insert(self.pick(group.unheard.iter(), 0))),
                }
            }
            let idle: Vec<String> = sources.difference(&self.fetching).cloned().collect();
            self.fetching.extend(idle.iter().cloned());
            idle
        }

        /// The spans that a source has to give before this node can answer for them.
        pub fn needed_from(&self, source: &str) -> Vec<Span> {
            let needed = self.incoming.iter().filter(|(_, incoming)| incoming.blocks() && incoming.is_from(source));
            needed.map(|(from, it)| Span { from: from.clone(), to: it.to.clone() }).collect()
        }

        /// Notes how many keys a source has to give.
        pub fn note_left(&mut self, version: Version, source: &str, left: u64) {
            if self.version() == Some(version) && self.fetching.contains(source) {
                self.keys_left.insert(source.to_owned(), left);
            }
        }

        /// What to fetch next from a source, and whether this node answers for it already: then the two only compare what they have.
        /// None if nothing is left, or the table is not the one of this version any more.
        pub fn next_from(&mut self, source: &String, version: Version) -> Option<(Span, bool)> {
            let mut spans = self.incoming.iter().filter(|(_, incoming)| incoming.is_from(source));
            let next = spans.next().map(|(from, it)| (Span { from: from.clone(), to: it.to.clone() }, !it.blocks()));
            if self.version() == Some(version) && next.is_none() {
                self.fetching.remove(source);
                self.keys_left.remove(source);
            }
            next.filter(|_| self.version() == Some(version))
        }

        /// Stores what a source gave of a span. What is not incoming any more is left out: a client may have written or deleted it here
        /// since then. False if the table is another one by now.
        pub fn merge(&mut self, version: Version, source: &str, span: &Span, records: Vec<(Record, Causal)>) -> bool {
            if self.version() != Some(version) {
                return false;
            }
            if let Some(left) = self.keys_left.get_mut(source) {
                let keys = records.iter().filter(|(record, _)| !record.is_tombstone()).count();
                *left = left.saturating_sub(keys as u64);
            }
            let from_source = self.incoming_in(span).filter(|(_, incoming)| incoming.is_from(source));
            let spans: Vec<Span> = from_source.map(|(span, _)| span).collect();
            for (record, context) in records {
                let hash = hash_of(record.key());
                let awaited = spans.iter().any(|span| span.contains((hash, record.key())));
                if awaited {
                    self.take_in(record, context, Agreement::note_fetched);
                }
            }
            true
        }

        /// Crosses off a source for a span that it has given, and forgotten where there is one replica.
        pub fn arrived(&mut self, version: Version, source: &str, span: &Span, is_whole: bool) {
            if self.version() != Some(version) || self.incoming.is_empty() {
                return;
            }
            let suffices = is_whole && self.is_replicated();
            let overlaps: Vec<Position> = self.incoming_in(span).map(|(span, _)| span.from).collect();
            for from in overlaps {
                let Some(mut incoming) = self.incoming.remove(&from) else { continue };
                let (inner_from, inner_to) =
                    (from.clone().max(span.from.clone()), incoming.to.clone().min(span.to.clone()));
                if inner_to < incoming.to {
                    self.incoming.insert(inner_to.clone(), incoming.clone());
                }
                if from < inner_from {
                    let before = Incoming { to: inner_from.clone(), ..incoming.clone() };
                    self.incoming.insert(from, before);
                }
                for group in &mut incoming.groups {
                    group.is_covered |= group.unheard.remove(source) && suffices;
                }
                // Of the other replicas of its shard, one that started blank needs one: what else others have comes when they
                // compare.
                incoming.groups.retain(|group| !group.unheard.is_empty() && (group.of_table || !group.is_covered));
                if !incoming.groups.is_empty() {
                    self.incoming.insert(inner_from, Incoming { to: inner_to, ..incoming });
                }
            }
            if self.incoming.is_empty() {
                self.lines.push(format!("table {version}: everything is fetched"));
            }
        }

        // -- Meeting others

        /// Whom to meet next: a neighbour, now and then one of the others, and four that seem to be silent or not to have this
        /// table; of these always those whose turn was longest ago. Whoever has started again must hear of the table within a
        /// second.
        pub fn next_to_meet(&mut self) -> BTreeSet<String> {
            let Some(table) = self.table.clone() else { return BTreeSet::new() };
            let mut others = set_of(table.view.iter().cloned());
            if !self.complete {
                others.extend(table.sources());
            }
            let replicas = self.others();
            others.extend(self.promises.iter().map(|promise| promise.coordinator.clone()));
            others.remove(&self.own);
            self.peers.retain(|node, _| others.contains(node));
            if others.is_empty() {
                self.met = self.now;
            }
            let others: Vec<String> = others.into_iter().collect();
            let turn = |node: &String| self.peers.get(node).map_or(0, |peer| peer.turn.as_micros() as u64);
            let in_turn: Vec<String> =
                in_order(others.iter().map(turn)).into_iter().map(|it| others[it].clone()).collect();
            let version = self.version();
            let odd = |node: &&String| self.peers.get(*node).is_none_or(|peer| peer.silent || peer.version != version);
            let odd = in_turn.iter().filter(odd).take(4);
            // The same neighbour again and again, to which a stream stays open. Of whatever nodes start again, one is the
            // neighbour of one that did not.
            let neighbour = in_turn.iter().filter(|node| **node > self.own).min().or(in_turn.iter().min());
            let in_turn = in_turn.iter().take(usize::from(self.rounds.is_multiple_of(4)));
            let replica = replicas.get(self.rounds as usize % replicas.len().max(1));
            let next = set_of(in_turn.chain(neighbour).chain(odd).chain(replica).cloned());
            for node in &next {
                self.peers.entry(node.clone()).or_default().turn = self.now;
            }
            next
        }

        /// The nodes that are to be asked for their tables at once.
        pub fn take_ahead(&mut self) -> BTreeSet<String> {
            std::mem::take(&mut self.ahead)
        }

        /// The nodes that do not answer, as far as this one knows.
        pub fn silent(&self) -> Vec<String> {
            self.peers.iter().filter(|(_, peer)| peer.silent).map(|(node, _)| node.clone()).collect()
        }

        /// How many keys it has still to fetch; None as long as that is not known.
        fn to_fetch(&self) -> Option<u64> {
            let waits = |source: &String| self.incoming.values().any(|it| it.blocks() && it.is_from(source));
            let is_known = self.fetching.iter().all(|source| self.keys_left.contains_key(source) || !waits(source));
            is_known.then(|| self.keys_left.values().sum())
        }

        /// What an operator asks of a node first, as members of a JSON object.
        pub fn describe(&self) -> String {
            let silent = self.silent().join(r#"",""#);
            let silent = if silent.is_empty() { silent } else { format!(r#""{silent}""#) };
            let Some(table) = &self.table else { return format!(r#","keys-to-fetch":null,"silent":[{silent}]"#) };
            let shard = self.shard.map_or(String::new(), |shard| format!(r#","shard-id":"{}""#, shard + 1));
            let left = self.to_fetch().map_or("null".into(), |left| left.to_string());
            let (factor, version) = (table.factor, table.version);
            format!(
                r#"{shard},"repl-factor":{factor},"table-version":"{version}","keys-to-fetch":{left},"silent":[{silent}]"#
            )
        }

        /// The same for `/metrics`: the epoch and number of its table, how many keys it has still to fetch, and how many are silent.
        pub fn gauges(&self) -> [u64; 4] {
            let version = self.version().unwrap_or_default();
            [version.epoch, version.number, self.to_fetch().unwrap_or(0), self.silent().len() as u64]
        }

        /// A node that this one waits for, to name it in an error.
        pub fn missing(&self) -> String {
            let asked = || self.to_ask().into_iter().next();
            self.silent().into_iter().next().or_else(asked).unwrap_or_else(|| self.own.clone())
        }

        // -- Starting

        /// Begins a round of asking, if this node is blank and a round is due: all ask all, so large stores ask less often.
        pub fn begin_round(&mut self) -> bool {
            self.rounds += 1;
            let pause = Duration::from_millis(20) * self.first_view.len() as u32;
            let due = self.table.is_none() && !self.is_asking && self.now >= self.asked + pause;
            if due {
                (self.is_asking, self.asked) = (true, self.now);
            }
            due
        }

        /// Whom a blank node asks: everybody who may know a table, or a node that does.
        pub fn to_ask(&self) -> Vec<String> {
            let mut nodes = set_of(self.first_view.iter().cloned());
            nodes.extend(self.heard.iter().flat_map(|(table, from)| table.view.iter().chain(from)).cloned());
            nodes.extend(self.promises.iter().flat_map(|promise| &promise.nodes).cloned());
            nodes.remove(&self.own);
            nodes.into_iter().collect()
        }

        pub fn promised(&self) -> Vec<Promise> {
            self.promises.clone()
        }

        /// Has a blank node go by a table, if what it was answered in a round of asking allows that. `known` are the promises
        /// that it knew before the round.
        pub fn let_in(&mut self, known: &[Promise], answers: &BTreeMap<String, Status>) {
            self.is_asking = false;
            if self.table.is_some() {
                return;
            }
            for promise in answers.values().flat_map(|status| &status.promises) {
                if !self.promises.iter().any(|it| it.version == promise.version) {
                    self.promises.push(Promise { granted: Duration::ZERO, ..promise.clone() });
                }
            }
            // A table that nobody goes by any more was lost with its nodes.
            let is_lost = |(table, tellers): &mut (Table, BTreeSet<String>)| {
                table.view.iter().chain(&*tellers).all(|node| *node == self.own || answers.contains_key(node))
                    && !answers.values().any(|status| status.version == Some(table.version))
            };
            self.heard.take_if(is_lost);
            let table = self.heard.as_ref().map(|(table, _)| table.clone()).or_else(|| self.first_table(answers));
            let Some(table) = table.filter(|table| self.may_go_by(table, known, answers)) else { return };
            self.lines.push(format!("started blank, and goes by table {}", table.version));
            self.adopt(table);
        }

        /// Whether this blank node may go by a table. Yes if more than half of its other nodes go by it, or each of them does or is blank
        /// too; and nobody goes by a newer one, is making one, or may have made one that only some know.
        fn may_go_by(&self, table: &Table, known: &[Promise], answers: &BTreeMap<String, Status>) -> bool {
            // All that an open lock names must have answered since this node was told of it.
            let is_resolved = |promise: &Promise| {
                let answered = |node: &String| *node == self.own || answers.contains_key(node);
                promise.version <= table.version
                    || known.iter().any(|it| it.version == promise.version) && promise.nodes.iter().all(answered)
            };
            let others: Vec<&String> = table.view.iter().filter(|node| **node != self.own).collect();
            let by_it =
                |node: &&&String| answers.get(**node).is_some_and(|status| status.version == Some(table.version));
            let blank = |node: &&&String| answers.get(**node).is_some_and(|status| status.version.is_none());
            let (by_it, blank) = (others.iter().filter(by_it).count(), others.iter().filter(blank).count());
            let has_waited = |node: &&String| answers.get(*node).is_none_or(|status| status.rounds >= FIRST);
            let newer = |status: &Status| status.store == Some(table.store) && status.version > Some(table.version);
            let known_to_enough = 2 * by_it > others.len() || by_it + blank == others.len();
            // What nobody goes by any more was lost with its nodes.
            let lives =
                table.version.is_first() || answers.values().any(|status| status.version == Some(table.version));
            known_to_enough
                && lives
                && (by_it > 0 || self.rounds >= FIRST && others.iter().all(has_waited))
                && !answers.values().any(|status| status.coordinating || newer(status))
                && self.promises.iter().all(is_resolved)
        }

        /// The table of the first view. Nodes are struck from it whose own `VIEW` does not list them, or that another one's
        /// leaves out. All that remain must have answered, and see it the same way.
        fn first_table(&self, answers: &BTreeMap<String, Status>) -> Option<Table> {
            let view_of = |node: &String| match *node == self.own {
                true => Some(&self.first_view),
                false => answers.get(node).map(|status| &status.first_view),
            };
            let listed = |node: &&String| {
                let listing = |other: &String| view_of(other).is_none_or(|view| view.contains(node));
                self.first_view.iter().all(listing)
            };
            let kept: Vec<&String> = self.first_view.iter().filter(listed).collect();
            let lowest = kept.iter().copied().min().filter(|_| kept.contains(&&self.own))?;
            let view: Vec<String> = view_of(lowest)?.iter().filter(|node| kept.contains(node)).cloned().collect();
            let factor = if *lowest == self.own { self.first_factor } else { answers.get(lowest)?.factor };
            let factor = factor.max(1);
            let agrees = |node: &&String| view_of(node).is_some_and(|theirs| view.iter().all(|it| theirs.contains(it)));
            kept.iter().all(agrees).then(|| Table::first(view, factor))
        }

        // -- Coordinating

        /// Begins to coordinate a change: its version, above all that this node knows and above `least`; none if one is under
        /// way.
        pub fn begin_change(&mut self, least: Version, force: bool) -> Option<Version> {
            let table = self.table.as_ref().filter(|_| !self.coordinating)?;
            let newest = self.promises.iter().map(|promise| promise.version).max().unwrap_or_default();
            let known = [table.version, newest, self.coordinated, least];
            let (epoch, number) = known.iter().fold((0, 0), |(e, n), it| (it.epoch.max(e), it.number.max(n)));
            self.coordinated = Version {
                epoch: epoch.saturating_add(force.into()),
                number: number.saturating_add(1),
                coordinator: self.incarnation,
            };
            self.coordinating = true;
            Some(self.coordinated)
        }

        pub fn end_change(&mut self) {
            self.coordinating = false;
        }

        /// Grants a lock to a coordinator, or says why not.
        fn grant(
            &mut self,
            version: Version,
            store: Option<u64>,
            coordinator: &str,
            nodes: Vec<String>,
            void: &[Version],
        ) -> Reply {
            if let Some(refusal) = self.refusal_of_lock(version, &nodes) {
                return refusal;
            }
            self.newest_grant = version;
            self.promises.retain(|promise| !void.contains(&promise.version));
            let (coordinator, granted) = (coordinator.to_owned(), self.now);
            self.promises.push(Promise { version, store, coordinator, nodes, granted });
            Reply::Done
        }

        /// Why a lock is not granted, if it is not.
        fn refusal_of_lock(&self, version: Version, nodes: &[String]) -> Option<Reply> {
            let promised = self.promises.iter().map(|promise| promise.version);
            let newest = promised.chain(self.version()).chain([self.newest_grant]).max();
            // A coordinator that is known to be silent holds nobody up. (On this depends how soon another change succeeds, and never
            // whether one is right.)
            let holds = |promise: &Promise| {
                let is_silent = self.is_silent(&promise.coordinator);
                promise.version.coordinator != version.coordinator
                    && !is_silent
                    && promise.granted + self.lease > self.now
            };
            let is_absurd = nodes.len() > 3000
                || nodes.iter().any(|node| port_of(node).is_none())
                || version.number.max(version.epoch) > u64::MAX / 2
                || self.promises.len() > 100;
            match newest {
                Some(newest) if version <= newest => Some(Reply::Outdated(newest)),
                _ if is_absurd => Some(Reply::Refused),
                _ if self.promises.iter().any(holds) => Some(Reply::Busy),
                _ => None,
            }
        }

        /// Whether a lock was never followed by a table, nor by the word that there will be none: somebody has to find out.
        /// True at most once in a while.
        pub fn has_forgotten_lock(&mut self) -> bool {
            let forgotten = self.promises.iter().any(|promise| promise.granted + self.lease * 3 / 2 < self.now);
            let due = forgotten && self.table.is_some() && self.resolved_locks + self.lease < self.now;
            if due {
                self.resolved_locks = self.now;
            }
            due
        }

        /// The coordinator adopts the table that it made, if its lock is still the newest that it granted. This step is the
        /// change.
        pub fn adopt_own(&mut self, table: Table) -> bool {
            let may = self.newest_grant == table.version && self.version() == Some(table.base);
            if may {
                self.coordinating = false;
                self.adopt(table);
            }
            may
        }
    }
}

// ---- What a node does: answering, fetching, meeting, starting, changing the view ------------------------------------

mod protocol {
    //! These are async functions for one reason only: the simulation runs many of them at once, and decides what each message
    //! meets. In the program every wait blocks the coroutine or thread that it is in, and `block_on` polls once.

    use super::*;

    /// How a node reaches its own state, the others, and time.
    pub trait World: Clone {
        /// Looks at the node, or changes it, under its lock.
        fn with<T>(&self, action: impl FnOnce(&mut Node) -> T) -> T;
        /// Takes messages to nodes, side by side; None for each that was not answered in time.
        fn deliver(&self, envelopes: Vec<Envelope>) -> impl Future<Output = Vec<Option<(Status, Reply)>>>;
        /// Has other replicas store something, side by side; None for each that did not answer in time.
        fn push(&self, pushes: Vec<Push>) -> impl Future<Output = Vec<Option<Pushed>>>;
        /// Takes a client's request to a node that has its key. Without an answer, it says whether the request may have got there.
        fn relay(&self, node: &str, request: Request, patience: Duration)
        -> impl Future<Output = Result<Answer, Lost>>;
        fn sleep(&self, time: Duration) -> impl Future<Output = ()>;
        fn spawn(&self, activity: Activity);
    }

    /// What goes on beside whoever began it.
    #[derive(Clone)]
    pub enum Activity {
        Fetch(String),
        Meet(String),
        Start,
        ResolveLocks,
        /// Tells the other replicas what all have by now.
        Tell,
        /// Finds out whether all nodes have fetched what the table gives them.
        Finish,
    }

    pub async fn run(world: impl World, activity: Activity) {
        match activity {
            Activity::Fetch(source) => fetch_all(&world, &source).await,
            Activity::Meet(node) => meet(&world, &node).await,
            Activity::Start => start(&world).await,
            Activity::ResolveLocks => drop(change_view(&world, None, None, false).await),
            Activity::Tell => tell_settled(&world).await,
            Activity::Finish => finish(&world).await,
        }
    }

    /// How many nodes are asked at a time: a view of a thousand names costs no more threads than one of ten.
    const SIDE_BY_SIDE: usize = 16;

    type Replies = Vec<Option<(Status, Reply)>>;

    /// Says something to each of some nodes, hears what they tell, and returns their replies. (Boxed: there are many callers,
    /// and the compiler would put all of this into each of them.)
    fn ask_each<'a>(
        world: &'a impl World,
        messages: Vec<(String, Message)>,
    ) -> Pin<Box<dyn Future<Output = Replies> + 'a>> {
        Box::pin(async move {
            let mut replies = Vec::new();
            for group in messages.chunks(SIDE_BY_SIDE) {
                let compose = |node: &mut Node| group.iter().map(|(to, it)| node.compose(to, it.clone())).collect();
                let lives: Vec<u64> =
                    world.with(|node| group.iter().map(|(name, _)| node.incarnation_of(name)).collect());
                let asked = world.with(|node| node.now);
                let mut answers = world.deliver(world.with(compose)).await;
                world.with(|node| {
                    // Of one that slept meanwhile: what it was given may be of before a deletion whose tombstone is gone.
                    if node.now > asked + LATE {
                        answers.iter_mut().for_each(|answer| *answer = None);
                        return;
                    }
                    for (((name, _), answer), life) in group.iter().zip(&answers).zip(lives) {
                        match answer {
                            Some((status, _)) => node.hear(name, status.clone(), true),
                            None => node.note_silence(name, life),
                        }
                    }
                });
                replies.extend(answers);
            }
            replies
        })
    }

    /// Says the same to some nodes.
    async fn ask(world: &impl World, nodes: &[String], message: Message) -> Replies {
        ask_each(world, nodes.iter().map(|node| (node.clone(), message.clone())).collect()).await
    }

    async fn ask_one(world: &impl World, node: &str, message: Message) -> Option<(Status, Reply)> {
        ask_each(world, vec![(node.to_owned(), message)]).await.pop()?
    }

    /// Answers what another node says.
    pub fn receive(world: &impl World, envelope: Envelope) -> (Status, Reply) {
        let (reply, ahead) = world.with(|node| (node.receive(envelope), node.take_ahead()));
        for node in ahead {
            world.spawn(Activity::Meet(node));
        }
        start_fetching(world);
        reply
    }

    // -- Answering requests

    /// A request for a key on its way to whoever has the key.
    pub struct KeyRequest<'a, W> {
        world: &'a W,
        hash: u64,
        key: &'a [u8],
        request: &'a Request,
        vocabulary: Vocabulary,
        began: Duration,
        deadline: Duration,
    }

    /// Answers a request for a key, of which `tried` is what came of it here so far, since it began.
    pub async fn answer_for_key(
        world: &impl World,
        key: &[u8],
        tried: Tried,
        began: Duration,
        request: &Request,
        vocabulary: Vocabulary,
    ) -> Answer {
        let (hash, deadline) = (hash_of(key), began + PATIENCE);
        let request = KeyRequest { world, hash, key, request, vocabulary, began, deadline };
        request.answer(tried).await
    }

    impl<W: World> KeyRequest<'_, W> {
        async fn answer(&self, mut tried: Tried) -> Answer {
            loop {
                tried = match tried {
                    Tried::Done(outcome, context) => return self.render(outcome, &context),
                    Tried::Written(outcome, record, context) => {
                        return self.acknowledge(outcome, record, context).await;
                    }
                    Tried::NotHere(place, action, context) => match self.seek(place, &context).await {
                        Some(answer) => return answer,
                        None => self.perform(action, context),
                    },
                    Tried::Behind(action, context) => match self.catch_up(&context).await {
                        Caught::TryAgain => self.perform(action, context),
                        // (A DELETE is never refused for its context.)
                        Caught::Unknown if !matches!(action, Action::Delete) => {
                            return self.render(Outcome::Unsatisfied, &context);
                        }
                        Caught::Nowhere | Caught::Unknown => self.perform_anyway(action, context),
                    },
                    Tried::Settling(action, context) => {
                        self.world.sleep(Duration::from_millis(3)).await;
                        // If it takes longer, the client is told by its context.
                        match self.world.with(|node| node.now) > self.began + Duration::from_millis(20) {
                            true => self.perform_anyway(action, context),
                            false => self.perform(action, context),
                        }
                    }
                }
            }
        }

        fn perform(&self, action: Action, context: Option<Causal>) -> Tried {
            self.world.with(|node| perform(node, self.hash, self.key, action, context, self.request.origin))
        }

        fn perform_anyway(&self, action: Action, context: Option<Causal>) -> Tried {
            self.world.with(|node| perform_anyway(node, self.hash, self.key, action, context))
        }

        fn render(&self, outcome: Outcome, context: &Option<Causal>) -> Answer {
            outcome.answer(self.vocabulary, &self.request.verb).with_context(context)
        }

        fn render_down(&self, node: &str, context: &Option<Causal>) -> Answer {
            let answer = Outcome::NodeDown(node.to_owned()).answer(self.vocabulary, &self.request.verb);
            answer.with_address(node, self.vocabulary).with_context(context)
        }

        /// Answers for a record that was written here, as soon as the other replicas have it.
        async fn acknowledge(&self, outcome: Outcome, record: Record, context: Option<Causal>) -> Answer {
            if let Err(missing) = replicate(self.world, self.hash, &record, self.deadline).await {
                return self.render_down(&missing, &context);
            }
            let after = context.map(|mut context| {
                // A tombstone may be gone by now, and the key be somebody else's.
                context.extend(str::from_utf8(self.key).ok().map(|key| (key.to_owned(), record.stamp())));
                self.world.with(|node| node.context_after(context, self.hash, self.key))
            });
            self.render(outcome, &after)
        }

        /// Brings the request to the key, or the key to the request. None if it is to be tried here again.
        async fn seek(&self, place: Place, context: &Option<Causal>) -> Option<Answer> {
            let world = self.world;
            match place {
                // What another node passed on is not passed on again. (A blank node does not even know whose the key is.)
                Place::Node(_) | Place::Unknown if self.request.origin != Origin::Client => {
                    return Some(self.render(Outcome::Elsewhere, context));
                }
                Place::Node(owner) => match self.pass_on(owner).await {
                    // Its table is not ours: one of us learns which is newer.
                    (owner, Some(answer)) if answer.status == 421 => {
                        ask_one(world, &owner, Message::Meet).await;
                        world.sleep(Duration::from_millis(1)).await;
                    }
                    (owner, Some(answer)) => return Some(answer.with_address(&owner, self.vocabulary)),
                    (owner, None) => return Some(self.render_down(&owner, context)),
                },
                Place::Incoming(source, version, span) => {
                    if fetch(world, &source, version, &span, ON_DEMAND).await.is_none() {
                        let needs_it = |node: &mut Node| node.still_needs(self.hash, self.key, &source);
                        if world.with(|node| node.is_silent(&source) && needs_it(node)) {
                            return Some(self.render_down(&source, context));
                        }
                        world.sleep(Duration::from_millis(5)).await;
                    }
                }
                Place::Unknown | Place::Here => world.sleep(Duration::from_millis(5)).await,
            }
            let missing = world.with(|node| (node.now > self.deadline).then(|| node.missing()))?;
            Some(self.render_down(&missing, context))
        }

        /// Takes a client's request to a node that has its key: to `owner` first, and to other replicas as long as it cannot have
        /// taken effect. Returns who answered, or who did not.
        async fn pass_on(&self, mut owner: String) -> (String, Option<Answer>) {
            let (world, is_read, mut asked) = (self.world, self.request.verb == "GET", Vec::new());
            loop {
                asked.push(owner.clone());
                let (store, life, now, another) = world.with(|node| {
                    let another = node.another(self.hash, self.key, &asked);
                    (node.store().unwrap_or_default(), node.incarnation_of(&owner), node.now, another)
                });
                let limit = if another.is_some() && is_read { NEXT_REPLICA } else { PATIENCE };
                let passed_on = Request { origin: Origin::Node(store), ..self.request.clone() };
                let lost = match world.relay(&owner, passed_on, self.deadline.saturating_sub(now).min(limit)).await {
                    Ok(answer) => return (owner, Some(answer)),
                    Err(lost) => lost,
                };
                match another.filter(|_| is_read || !lost.was_sent) {
                    Some(another) => {
                        world.with(|node| node.note_silence(&owner, life));
                        owner = another;
                    }
                    None => return (owner, None),
                }
            }
        }

        /// Gets what a context asks for of the key from the other replicas.
        async fn catch_up(&self, context: &Option<Causal>) -> Caught {
            let (world, key) = (self.world, self.key);
            let span = Span { from: (self.hash, key.to_vec()), to: (self.hash, [key, &[0]].concat()) };
            loop {
                let (version, others) = world.with(|node| (node.version(), node.who_may_have(&span)));
                let Some(version) = version else { return Caught::TryAgain };
                let replies = ask(world, &others, Message::GiveAll(version, vec![span.clone()], true)).await;
                let has_all = replies.iter().all(|reply| matches!(reply, Some((_, Reply::All(..)))));
                let is_here = world.with(|node| {
                    if node.version() != Some(version) {
                        return true;
                    }
                    for reply in replies.iter().flatten() {
                        if let (_, Reply::All(copies, ..)) = reply {
                            let records = copies.iter().filter_map(record_of_copy);
                            records.for_each(|(record, context)| node.take(record, context));
                        }
                    }
                    context.as_ref().is_none_or(|context| node.satisfies(self.hash, key, context))
                });
                if is_here {
                    return Caught::TryAgain;
                } else if has_all {
                    return Caught::Nowhere;
                } else if world.with(|node| node.now) > self.began + CATCH_UP {
                    return Caught::Unknown;
                }
                world.sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// A request got no answer.
    #[derive(Clone, Copy)]
    pub struct Lost {
        /// It may have got there, and have done what it asks for.
        pub was_sent: bool,
    }

    /// How long one replica has to answer a read before another one is asked.
    const NEXT_REPLICA: Duration = Duration::from_millis(1200);

    /// What came of looking for what a context asks for of a key.
    enum Caught {
        /// It is here now; or the table is another one, and it is to be seen anew who has the key.
        TryAgain,
        /// All replicas say that they do not have it: it was a deletion, long ago, or was lost with all that had it.
        Nowhere,
        /// Somebody who may have it does not answer.
        Unknown,
    }

    /// For how long other replicas are asked again for what a context asks for. With the time that the last answer takes, that is less
    /// than the second that the contract allows.
    const CATCH_UP: Duration = Duration::from_millis(250);

    // -- Several replicas

    /// Has the other replicas store a record that was written here: all that are not silent, and whoever is to have it by a table
    /// that comes meanwhile. Only then may the write be acknowledged. The error is a node that did not take it in time: the write is
    /// not undone, but its client is not told that it was done.
    async fn replicate(world: &impl World, hash: u64, record: &Record, deadline: Duration) -> Result<(), String> {
        let (mut stored_at, mut table, mut blank_last_time) = (BTreeMap::new(), None, None);
        loop {
            let Some((version, lacking)) = world.with(|node| node.lacking(hash, record.key(), &stored_at)) else {
                return Ok(());
            };
            // By another table it is to be stored anew: other nodes may be to have it, and who had it may have dropped it.
            if table.replace(version).is_some_and(|before| before != version) {
                (stored_at, blank_last_time) = (BTreeMap::new(), None);
                continue;
            }
            if lacking.is_empty() {
                world.with(|node| node.written(record, &stored_at));
                start_telling(world);
                return Ok(());
            }
            // Those that lack it were blank when all others had it already: they fetch it from these with the rest of the shard.
            if blank_last_time.as_ref() == Some(&lacking) {
                return Ok(());
            }
            let answers = push_to(world, &lacking, version, vec![world.with(|node| node.copy_of(record))]).await;
            let all_blank = answers.iter().all(|answer| *answer == Some(Pushed::Refused(None)));
            blank_last_time = all_blank.then(|| lacking.clone());
            for (other, answer) in lacking.iter().zip(answers) {
                if let Some(Pushed::Taken(incarnation)) = answer {
                    stored_at.insert(other.clone(), incarnation);
                    // It may have started again since, or before it was last heard.
                    if world.with(|node| node.incarnation_of(other)) != incarnation {
                        ask_one(world, other, Message::Meet).await;
                    }
                }
            }
            if world.with(|node| node.now) > deadline {
                return lacking.into_iter().find(|it| !stored_at.contains_key(it)).map_or(Ok(()), Err);
            }
        }
    }

    /// Has some replicas store records. Those that refuse are met, and those that do not answer are silent.
    async fn push_to(
        world: &impl World,
        replicas: &[String],
        version: Version,
        records: Vec<Copied>,
    ) -> Vec<Option<Pushed>> {
        let compose = |node: &mut Node| -> Vec<Push> {
            replicas.iter().map(|to| node.compose_push(to, version, records.clone())).collect()
        };
        let pushes = world.with(compose);
        let lives: Vec<u64> = pushes.iter().map(|push| push.life).collect();
        let answers = world.push(pushes).await;
        for ((replica, answer), life) in replicas.iter().zip(&answers).zip(lives) {
            match answer {
                Some(Pushed::Taken(_)) => {}
                // One of us learns which table is newer, or how late it is there.
                Some(Pushed::Refused(_)) => {
                    ask_one(world, replica, Message::Meet).await;
                    world.sleep(Duration::from_millis(2)).await;
                }
                None => world.with(|node| node.note_silence(replica, life)),
            }
        }
        answers
    }

    /// Finds out what another replica has that this one lacks, or the other way round, and evens it out. From then on it has
    /// all that is here, as long as it lives.
    async fn compare(world: &impl World, other: &str) {
        let (version, spans) = world.with(|node| (node.version(), node.own_spans()));
        let (life, arrivals) = world.with(|node| (node.incarnation_of(other), node.agreement.arrivals));
        let Some(version) = version else { return };
        // Digests do not show them.
        let tombstones = world.with(|node| node.open_tombstones());
        if give(world, other, version, life, tombstones).await.is_none() {
            return;
        }
        for span in spans {
            if compare_span(world, other, version, &span).await.is_none() {
                return;
            }
        }
        world.with(|node| {
            if node.version() == Some(version) {
                node.agree(other, life, arrivals);
            }
        });
    }

    /// Evens out a span with another node that goes by the same table: by buckets, then by parts of those that differ. None if
    /// that could not be finished.
    async fn compare_span(world: &impl World, other: &str, version: Version, span: &Span) -> Option<()> {
        let parts = world.with(|node| node.records.parts_of(span));
        for group in parts.chunks(MAX_SPANS) {
            for buckets in differing(world, other, version, group).await?.chunks(MAX_SPANS / PIECES) {
                let pieces: Vec<Span> = buckets.iter().flat_map(pieces_of).collect();
                let mut left = differing(world, other, version, &pieces).await?;
                while !left.is_empty() {
                    let (_, reply) = ask_one(world, other, Message::GiveAll(version, left.clone(), false)).await?;
                    let Reply::All(copies, count, to) = reply else { return None };
                    let given: Vec<Span> = match count {
                        0 if left[0].from < to && to < left[0].to => {
                            let from = std::mem::replace(&mut left[0].from, to.clone());
                            vec![Span { from, to }]
                        }
                        _ => left.drain(..count.clamp(1, left.len())).collect(),
                    };
                    exchange(world, other, version, &given, &copies).await?;
                }
            }
        }
        Some(())
    }

    async fn differing(world: &impl World, other: &str, version: Version, spans: &[Span]) -> Option<Vec<Span>> {
        let (_, reply) = ask_one(world, other, Message::Digests(version, spans.to_vec())).await?;
        let Reply::Digests(theirs) = reply else { return None };
        let ours = world.with(|node| (node.version() == Some(version)).then(|| node.records.digests_of(spans)))?;
        let pairs = spans.iter().zip(ours.into_iter().zip(theirs));
        Some(pairs.filter(|(_, (ours, theirs))| ours != theirs).map(|(span, _)| span.clone()).collect())
    }

    /// Into how many pieces a bucket that differs is cut, to find what differs.
    const PIECES: usize = 16;

    fn pieces_of(bucket: &Span) -> Vec<Span> {
        let (from, to) = (bucket.from.0 as u128, bucket.to.0 as u128);
        bucket.cut_at((1..PIECES as u128).map(|number| (from + (to - from) * number / PIECES as u128) as u64))
    }

    /// Takes what another node has of some spans, and has it store what is newer here.
    async fn exchange(
        world: &impl World,
        other: &str,
        version: Version,
        spans: &[Span],
        copies: &[Copied],
    ) -> Option<()> {
        let theirs: Vec<(Record, Causal)> = copies.iter().map(record_of_copy).collect::<Option<_>>()?;
        let mut known = Records::default();
        for (record, _) in &theirs {
            known.insert(hash_of(record.key()), record.clone());
        }
        let newer = world.with(|node| {
            let is_newer = |record: &Record| {
                known.get(hash_of(record.key()), record.key()).is_none_or(|known| record.beats(known))
            };
            let here = node.records.all_of(spans, usize::MAX);
            let newer = here.iter().flatten().filter(|it| is_newer(it)).map(|it| node.copy_of(it)).collect();
            if node.version() != Some(version) {
                return None;
            }
            theirs.into_iter().for_each(|(record, context)| node.take(record, context));
            // One that has left the shard needs nothing.
            let is_replica = node.others().iter().any(|it| it == other);
            Some((node.incarnation_of(other), if is_replica { newer } else { Vec::new() }))
        });
        let (life, newer) = newer?;
        give(world, other, version, life, newer).await
    }

    /// Has another replica, in this life of it, store some records.
    async fn give(
        world: &impl World,
        other: &str,
        version: Version,
        life: u64,
        mut records: Vec<Copied>,
    ) -> Option<()> {
        while !records.is_empty() {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while bytes < MAX_BATCH
                && let Some(copy) = records.pop()
            {
                bytes += copy.1.len() + 64;
                batch.push(copy);
            }
            let answers = push_to(world, &[other.to_owned()], version, batch).await;
            (answers == [Some(Pushed::Taken(life))]).then_some(())?;
        }
        Some(())
    }

    /// Tells the other replicas soon what is on all of them by now.
    fn start_telling(world: &impl World) {
        if world.with(|node| node.agreement.starts_telling()) {
            world.spawn(Activity::Tell);
        }
    }

    async fn tell_settled(world: &impl World) {
        // Meanwhile most of it goes along with other writes.
        world.sleep(Duration::from_millis(2)).await;
        let pushes = world.with(|node| {
            node.agreement.stops_telling();
            let version = node.version().unwrap_or_default();
            let to_tell = node.agreement.to_tell();
            to_tell.iter().map(|other| node.compose_push(other, version, Vec::new())).collect()
        });
        world.push(pushes).await;
    }

    /// Waits until this node may go by its table. The error names a node that it waits for.
    async fn await_table(world: &impl World) -> Result<(), Outcome> {
        let deadline = world.with(|node| node.now) + PATIENCE;
        while !world.with(|node| node.may_answer()) {
            if world.with(|node| node.now) > deadline {
                return Err(Outcome::NodeDown(world.with(|node| node.missing())));
            }
            world.sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// How many keys this instance has.
    pub async fn count_keys(world: &impl World) -> Result<Outcome, Outcome> {
        await_table(world).await?;
        let (count, shard) = world.with(|node| (node.keys(), node.shard()));
        let id = shard.map_or(String::new(), |shard| format!(r#","shard-id":"{}""#, shard + 1));
        Ok(Outcome::KeyCount(format!(r#""key-count":{count}{id}"#)))
    }

    /// The ids of all shards; or, with an index, what one of them is.
    pub async fn describe_shards(world: &impl World, index: Option<usize>) -> Result<Outcome, Outcome> {
        await_table(world).await?;
        let table = world.with(|node| node.table()).ok_or(Outcome::NoShard)?;
        let Some(index) = index else {
            let ids: Vec<String> = (1..=table.shards.len()).map(|id| format!(r#""{id}""#)).collect();
            return Ok(Outcome::Shards(ids.join(",")));
        };
        if index >= table.shards.len() {
            return Err(Outcome::NoShard);
        }
        let replicas = table.replicas(index);
        let count = count_of_shard(world, &table, &replicas).await;
        let Some(count) = count else { return Err(Outcome::NodeDown(replicas[0].clone())) };
        let (id, replicas) = (index + 1, replicas.join(r#"",""#));
        Ok(Outcome::Shard(format!(r#""shard-id":"{id}","key-count":{count},"replicas":["{replicas}"]"#)))
    }

    /// How many keys a shard has, by the first of its replicas that answers and lacks nothing; or by one that lacks something, if all
    /// that answer do.
    async fn count_of_shard(world: &impl World, table: &Table, replicas: &[String]) -> Option<usize> {
        let mut replicas = replicas.to_vec();
        // Those that are known to be silent come last.
        world.with(|node| replicas.sort_by_key(|it| node.is_silent(it)));
        let mut count = None;
        for node in replicas {
            let Some((status, _)) = ask_one(world, &node, Message::Meet).await else { continue };
            if may_speak(table, &status) {
                return Some(status.keys);
            }
            count = count.or(Some(status.keys));
        }
        count
    }

    // -- Fetching

    /// How many bytes of records a message has, about: where a request waits for one of them, and where none does.
    const ON_DEMAND: usize = 32 << 10;
    pub const MAX_BATCH: usize = 256 << 10;

    /// Fetches the first records of a span from a source. With one replica it has them forgotten there: from then on they are here. Until
    /// then nobody answers for them: if a write were acknowledged before, and this node started again, it would fetch the old value.
    async fn fetch(world: &impl World, source: &str, version: Version, span: &Span, limit: usize) -> Option<()> {
        let (_, reply) = ask_one(world, source, Message::Give(version, span.clone(), limit)).await?;
        let Reply::Records(copies, to, is_whole) = reply else { return None };
        let span = Span { from: span.from.clone(), to: to.min(span.to.clone()) };
        if span.to <= span.from {
            return None;
        }
        let records: Vec<(Record, Causal)> = copies.iter().map(record_of_copy).collect::<Option<_>>()?;
        if !world.with(|node| node.merge(version, source, &span, records)) {
            return None;
        }
        // With several replicas the source keeps what it has until all of them have everything.
        if !world.with(|node| node.is_replicated()) {
            let (_, reply) = ask_one(world, source, Message::Forget(version, span.clone())).await?;
            if !matches!(reply, Reply::Done) {
                return None;
            }
        }
        world.with(|node| node.arrived(version, source, &span, is_whole));
        Some(())
    }

    /// Fetches all that a source has to give, for as long as this node goes by the same table.
    async fn fetch_all(world: &impl World, source: &String) {
        let Some(version) = world.with(|node| node.version()) else { return };
        let mut left = Some(0);
        for spans in world.with(|node| node.needed_from(source)).chunks(16) {
            let reply = ask_one(world, source, Message::Count(version, spans.to_vec())).await;
            let count = if let Some((_, Reply::Count(count))) = reply { Some(count) } else { None };
            left = left.and_then(|left| Some(left + count?));
        }
        world.with(|node| left.iter().for_each(|left| node.note_left(version, source, *left)));
        while let Some((span, is_here)) = world.with(|node| node.next_from(source, version)) {
            let fetched = match is_here {
                true => compare_span(world, source, version, &span).await.map(|()| {
                    world.with(|node| node.arrived(version, source, &span, true));
                }),
                false => fetch(world, source, version, &span, MAX_BATCH).await,
            };
            if fetched.is_none() {
                world.sleep(Duration::from_millis(100)).await;
            }
        }
    }

    fn start_fetching(world: &impl World) {
        for source in world.with(|node| node.sources_to_fetch_from()) {
            world.spawn(Activity::Fetch(source));
        }
    }

    // -- Keeping in touch, and starting

    /// Meets some other nodes; a blank node asks everybody that may know what to go by. To be done several times a second:
    /// nobody waits here for one that is silent.
    pub fn keep_in_touch(world: &impl World) {
        let (blank, next) = world.with(|node| {
            node.sweep();
            (node.begin_round(), node.next_to_meet())
        });
        if blank {
            world.spawn(Activity::Start);
        }
        for node in next {
            world.spawn(Activity::Meet(node));
        }
        if world.with(|node| node.has_forgotten_lock()) {
            world.spawn(Activity::ResolveLocks);
        }
        if world.with(|node| node.is_to_finish()) {
            world.spawn(Activity::Finish);
        }
        start_fetching(world);
    }

    /// Does what a coordinator does when all has arrived, for one that died before.
    async fn finish(world: &impl World) {
        let Some(table) = world.with(|node| node.table()) else { return };
        let replies = ask(world, &table.view, Message::Meet).await;
        let has_all =
            |(status, _): &(Status, Reply)| status.version == Some(table.version) && status.incoming.is_empty();
        if replies.iter().all(|reply| reply.as_ref().is_some_and(has_all)) {
            complete(world, &table);
        }
    }

    /// Notes that all nodes have fetched what a table gives them. The others hear of it when they meet.
    fn complete(world: &impl World, table: &Table) {
        world.with(|node| {
            if node.version() == Some(table.version) {
                node.set_complete();
            }
        });
    }

    /// A round of a blank node's asking.
    async fn start(world: &impl World) {
        let (nodes, known) = world.with(|node| (node.to_ask(), node.promised()));
        let replies = ask(world, &nodes, Message::Meet).await;
        let answers = nodes.into_iter().zip(replies).filter_map(|(node, reply)| Some((node, reply?.0))).collect();
        world.with(|node| node.let_in(&known, &answers));
        start_fetching(world);
    }

    async fn meet(world: &impl World, other: &str) {
        let began = world.with(|node| node.now);
        ask_one(world, other, Message::Meet).await;
        world.with(|node| node.met = node.met.max(began));
        start_fetching(world);
        if world.with(|node| node.is_to_compare(other)) {
            compare(world, other).await;
        }
    }

    // -- Changing the view

    /// Answers a PUT of a view: changes it, or passes the request on to a node that can.
    pub async fn answer_view_change(world: &impl World, request: &Request, wanted: &WantedView) -> Answer {
        let render = |outcome: Outcome| outcome.answer(Vocabulary::Json, &request.verb);
        if let Err(outcome) = await_table(world).await {
            return render(outcome);
        }
        if let Some(node) = better_coordinator(world, &wanted.view).await {
            // It may take as long as it takes.
            let (store, before) = world.with(|node| (node.store().unwrap_or_default(), node.version()));
            let passed_on = Request { origin: Origin::Node(store), ..request.clone() };
            if let Ok(answer) = world.relay(&node, passed_on, CHANGE_LIMIT).await {
                return answer;
            }
            // It may be there, and have passed the request back, since the view is changing.
            if ask_one(world, &node, Message::Meet).await.is_some_and(|(status, _)| status.version.is_some()) {
                return render(Outcome::ChangeUnderWay);
            }
            return match look_for_change(world, before, wanted).await {
                Some(changed) => render(changed.outcome()),
                None => render(Outcome::NodeDown(node)),
            };
        }
        match change_view(world, Some(&wanted.view), wanted.factor, wanted.force).await {
            Ok(changed) => render(changed.outcome()),
            Err(refusal) => render(refusal),
        }
    }

    /// Who should coordinate instead of this node, if anybody: a member of its table, if this one is none. And if this node is alone and
    /// without keys, one of the view's other nodes that has keys, or a store around it: then this one joins that store.
    async fn better_coordinator(world: &impl World, view: &[String]) -> Option<String> {
        let (table, status) = world.with(|node| (node.table(), node.status()));
        let (table, own) = (table?, world.with(|node| node.own().to_owned()));
        let (alone, member) = (table.view.len() == 1 && status.keys == 0, table.lists(&own));
        if member && !alone {
            return None;
        }
        let others = if member { view } else { &table.view };
        let others: Vec<String> = others.iter().filter(|node| **node != own).cloned().collect();
        let replies = ask(world, &others, Message::Meet).await;
        // (One that has left this node's own store knows no better.)
        let has_left_another = |it: &Status| it.version.is_some() && !it.is_member && it.store != Some(table.store);
        let fits = |status: &Status| !member || status.keys > 0 || status.members > 1 || has_left_another(status);
        let mut answering =
            others.into_iter().zip(replies).filter(|(_, reply)| reply.as_ref().is_some_and(|(it, _)| fits(it)));
        answering.next().map(|(node, _)| node)
    }

    /// How a view change ended: how many keys it moves, the shards with their replicas and shares, and who is not reached.
    pub struct Changed {
        pub moved: usize,
        pub shards: Vec<(Vec<String>, usize)>,
        pub unreached: Vec<String>,
    }

    impl Changed {
        fn outcome(&self) -> Outcome {
            let mut shards = Vec::new();
            for (index, (nodes, count)) in self.shards.iter().enumerate() {
                let (id, replicas) = (index + 1, nodes.join(r#"",""#));
                let address = if nodes.len() == 1 { format!(r#""address":"{replicas}","#) } else { String::new() };
                shards.push(format!(r#"{{"shard-id":"{id}",{address}"replicas":["{replicas}"],"key-count":{count}}}"#));
            }
            let (shards, nodes) = (shards.join(","), self.unreached.join(r#"",""#));
            let unreached = if nodes.is_empty() { nodes } else { format!(r#","unreached":["{nodes}"]"#) };
            Outcome::ViewChanged(format!(r#""moved":{},"shards":[{shards}]{unreached}"#, self.moved))
        }
    }

    /// Why an attempt to change the view came to nothing.
    enum Failure {
        Refused(Outcome),
        /// To be tried again in a new epoch: nodes that leave are silent, and their shards have other replicas.
        NewEpoch,
        /// To be tried again with a version above this one, knowing this too.
        Again(Version, Earlier, Outcome),
    }

    /// What is known of earlier locks: the nodes that they name, and those of them of which nothing came.
    #[derive(Default)]
    struct Earlier {
        nodes: BTreeSet<String>,
        void: Vec<Version>,
    }

    /// What a change is to make: another view, or (None) the same table again under a new lock, to settle what became of older
    /// locks.
    pub type Wanted<'a> = Option<&'a [String]>;

    /// For how long a view change is tried while other nodes are starting, or a change before it is ending.
    const TRIES: Duration = Duration::from_secs(4);
    /// How long a node must not have answered after the change until it is not waited for any more.
    const UNREACHED: Duration = Duration::from_secs(3);

    /// Changes the view, as the coordinator. The error is an outcome as well, and then the old view stays in force.
    pub async fn change_view(
        world: &impl World,
        wanted: Wanted<'_>,
        factor: Option<usize>,
        force: bool,
    ) -> Result<Changed, Outcome> {
        let mut new_epoch = force;
        let deadline = world.with(|node| node.now) + TRIES;
        let (mut least, mut earlier) = (Version::default(), Earlier::default());
        loop {
            let Some(version) = world.with(|node| node.begin_change(least, new_epoch)) else {
                return Err(Outcome::ChangeUnderWay);
            };
            let attempt = Attempt { world, version, wanted, factor, force, new_epoch, earlier: &earlier };
            let result = attempt.run().await;
            world.with(|node| node.end_change());
            let (named, failure) = match result {
                Ok(made) => return Ok(spread(world, made).await),
                Err(failed) => failed,
            };
            // Tells all that nothing will come of this lock.
            ask(world, &named, Message::Meet).await;
            match failure {
                Failure::NewEpoch => new_epoch = true,
                Failure::Again(newest, learned, _) if world.with(|node| node.now) < deadline => {
                    least = least.max(newest);
                    earlier.nodes.extend(learned.nodes);
                    earlier.void.extend(learned.void);
                }
                Failure::Refused(outcome) | Failure::Again(.., outcome) => return Err(outcome),
            }
            world.sleep(Duration::from_millis(50)).await;
        }
    }

    /// Tells all nodes of a table that is in force now, and waits until they have fetched what it gives them.
    async fn spread(world: &impl World, (table, counts, named): Made) -> Changed {
        ask(world, &named, Message::Meet).await;
        start_fetching(world);
        let unreached = await_arrival(world, &table).await;
        let shards = (0..table.shards.len()).map(|shard| table.replicas(shard)).zip(counts).collect();
        Changed { moved: table.moved, shards, unreached }
    }

    /// Finds out what became of a change whose coordinator does not answer any more. None if nobody goes by such a table: then it was
    /// never made, or is lost with the coordinator.
    async fn look_for_change(world: &impl World, before: Option<Version>, wanted: &WantedView) -> Option<Changed> {
        let members = world.with(|node| node.table()).map_or(Vec::new(), |table| table.view.clone());
        let nodes: Vec<String> = set_of(wanted.view.iter().chain(&members).cloned()).into_iter().collect();
        ask(world, &nodes, Message::Meet).await;
        let is_wanted = |table: &Arc<Table>| {
            Some(table.version) > before
                && table.view == wanted.view
                && wanted.factor.is_none_or(|factor| factor == table.factor)
        };
        let table = world.with(|node| node.table()).filter(is_wanted)?;
        let unreached = await_arrival(world, &table).await;
        let mut shards = Vec::new();
        for replicas in (0..table.shards.len()).map(|shard| table.replicas(shard)) {
            let count = count_of_shard(world, &table, &replicas).await.unwrap_or(0);
            shards.push((replicas, count));
        }
        Some(Changed { moved: table.moved, shards, unreached })
    }

    struct Attempt<'a, W> {
        world: &'a W,
        version: Version,
        wanted: Wanted<'a>,
        factor: Option<usize>,
        force: bool,
        new_epoch: bool,
        earlier: &'a Earlier,
    }

    /// The table that was made, how many keys each shard has by it, and the nodes that were locked.
    type Made = (Table, Vec<usize>, Vec<String>);

    impl<W: World> Attempt<'_, W> {
        /// Locks all nodes, makes the next table and adopts it, which is the change. With an error come the nodes that may be
        /// locked.
        async fn run(&self) -> Result<Made, (Vec<String>, Failure)> {
            let Some(base) = self.world.with(|node| node.table()) else {
                return Err((Vec::new(), self.again(Outcome::ChangeUnderWay)));
            };
            let view = self.wanted.unwrap_or(&base.view);
            let mut named = set_of(base.view.iter().chain(view).chain(&self.earlier.nodes).cloned());
            // Of two coordinators, each must be asked by the other, member or not.
            named.insert(self.world.with(|node| node.own().to_owned()));
            if !self.world.with(|node| node.is_complete()) {
                named.extend(base.sources());
            }
            let named: Vec<String> = named.into_iter().collect();
            let joining: Vec<String> = view.iter().filter(|node| !base.lists(node)).cloned().collect();
            if let Err(failure) = self.meet_joining(&joining, &base).await {
                return Err((Vec::new(), failure));
            }
            match self.lock_and_make(&base, view, &named).await {
                Ok((table, counts)) if self.world.with(|node| node.adopt_own(table.clone())) => {
                    Ok((table, counts, named))
                }
                Ok(_) => Err((named, self.again(Outcome::ChangeUnderWay))),
                Err(failure) => Err((named, failure)),
            }
        }

        /// Before anything is locked, sees that those who join are there. One that has just started may belong to a store that
        /// it has not heard of yet.
        async fn meet_joining(&self, joining: &[String], base: &Table) -> Result<(), Failure> {
            for group in joining.chunks(SIDE_BY_SIDE) {
                for (node, reply) in group.iter().zip(ask(self.world, group, Message::Meet).await) {
                    let reply = match reply {
                        None => ask_one(self.world, node, Message::Meet).await,
                        reply => reply,
                    };
                    match reply {
                        None => return Err(Failure::Refused(Outcome::NodeDown(node.clone()))),
                        Some((status, _)) => self.check_joining(node, &status, base)?,
                    }
                }
            }
            Ok(())
        }

        /// Whether a node may join: it goes by our table, which does not list it; or it has left a store that wants nothing of
        /// it any more; or it is a store of one without keys.
        fn check_joining(&self, node: &str, status: &Status, base: &Table) -> Result<(), Failure> {
            let is_free = if status.is_member { status.members == 1 } else { status.complete };
            if status.version.is_none() {
                Err(self.again(Outcome::NodeDown(node.to_owned())))
            } else if status.version == Some(base.version) || is_free && status.keys == 0 {
                Ok(())
            } else if status.is_member {
                Err(Failure::Refused(Outcome::HoldsKeys(node.to_owned())))
            } else {
                // One that left some changes ago may still have to hear of the last ones.
                Err(self.again(Outcome::ChangeUnderWay))
            }
        }

        fn again(&self, outcome: Outcome) -> Failure {
            Failure::Again(self.version, Earlier::default(), outcome)
        }

        async fn lock_and_make(
            &self,
            base: &Table,
            view: &[String],
            named: &[String],
        ) -> Result<(Table, Vec<usize>), Failure> {
            let granted = self.lock(base, view, named).await?;
            let given_up: Vec<String> = named.iter().filter(|node| !granted.contains_key(*node)).cloned().collect();
            self.check_given_up(base, &granted, &given_up)?;
            self.check_locks(base, &granted, &given_up)?;
            let complete = self.check_nodes(base, view, &granted, &given_up)?;
            // (A store that shrinks below its factor has one shard of all its nodes, until it grows again: that is how a dead one leaves.)
            let change = Change::new(base, view, self.factor.unwrap_or(base.factor));
            let speakers: Vec<Option<String>> =
                (0..base.shards.len()).map(|shard| speaker(base, &granted, shard)).collect();
            let keys = |node: &Option<String>| node.as_ref().map_or(0, |node| granted[node].keys);
            let held: Vec<usize> = speakers.iter().map(keys).collect();
            let (moves, counts) = match self.wanted {
                Some(_) => change.plan(&held),
                None => (Vec::new(), held.clone()),
            };
            let cuts = self.cut(&moves, &speakers, granted.keys().cloned().collect(), complete).await?;
            let table = match held.iter().sum() {
                0 if self.wanted.is_some() => base.next_even(self.version, &change, &given_up, complete),
                _ => base.next(self.version, &change, &cuts, &given_up, complete),
            };
            Ok((Table { moved: moves.iter().map(|(.., count)| count).sum(), ..table }, counts))
        }

        /// Checks that nodes which do not answer may be left out: by force; or if another replica of each one's shard answers, and
        /// more than half of the old view does, so that two sides of a cut cannot both do it.
        fn check_given_up(
            &self,
            base: &Table,
            granted: &BTreeMap<String, Status>,
            given_up: &[String],
        ) -> Result<(), Failure> {
            let Some(first) = given_up.first().filter(|_| !self.force) else { return Ok(()) };
            let goes_by_it = |node: &&String| granted.get(*node).is_some_and(|it| it.version == Some(base.version));
            let is_majority = 2 * base.view.iter().filter(goes_by_it).count() > base.view.len();
            // One that has started again vouches for nothing before it has fetched everything.
            let is_whole = |node: &String| granted.get(node).is_some_and(|status| may_speak(base, status));
            let is_alone =
                |node: &String| base.shard_of(node).is_some_and(|shard| !base.replicas(shard).iter().any(is_whole));
            let is_lost = |group: &Vec<String>| group.iter().all(|node| given_up.contains(node));
            let is_waited_for = granted.values().any(|status| status.waits_for.iter().any(is_lost));
            let is_starting = |node: &String| granted.contains_key(node) && !is_whole(node);
            match is_majority && !is_waited_for && !given_up.iter().any(is_alone) {
                true if self.new_epoch => Ok(()),
                true => Err(Failure::NewEpoch),
                false if base.view.iter().any(is_starting) => Err(self.again(Outcome::NodeDown(first.clone()))),
                false => Err(Failure::Refused(Outcome::NodeDown(first.clone()))),
            }
        }

        /// Locks the nodes, the lowest address first: of two coordinators one fails there, and does not hold what the other
        /// needs. Returns what each told. Only a node that leaves by force need not answer.
        async fn lock(
            &self,
            base: &Table,
            view: &[String],
            named: &[String],
        ) -> Result<BTreeMap<String, Status>, Failure> {
            let mut granted = BTreeMap::new();
            let lock = Message::Lock(self.version, named.to_vec(), self.earlier.void.clone());
            let (lowest, rest) = named.split_at(1);
            for group in [lowest].into_iter().chain(rest.chunks(SIDE_BY_SIDE)) {
                let mut replies = ask(self.world, group, lock.clone()).await;
                for (name, reply) in group.iter().zip(&mut replies) {
                    if matches!(reply, Some((_, Reply::Refused))) {
                        return Err(self.again(Outcome::ChangeUnderWay));
                    } else if reply.is_none() {
                        *reply = ask_one(self.world, name, Message::Meet).await;
                        if reply.is_some() {
                            // Alive: the lock, or its reply, got lost.
                            return Err(self.again(Outcome::ChangeUnderWay));
                        }
                    }
                    match reply.take() {
                        Some((status, Reply::Done)) => drop(granted.insert(name.clone(), status)),
                        Some((_, Reply::Outdated(newest))) => {
                            return Err(Failure::Again(newest, Earlier::default(), Outcome::ChangeUnderWay));
                        }
                        Some(_) => return Err(Failure::Refused(Outcome::ChangeUnderWay)),
                        None if (self.force || base.factor > 1) && !view.contains(name) => {}
                        None => return Err(Failure::Refused(Outcome::NodeDown(name.clone()))),
                    }
                }
            }
            Ok(granted)
        }

        /// Checks that no earlier lock is open, and that nobody goes by a newer table.
        fn check_locks(
            &self,
            base: &Table,
            granted: &BTreeMap<String, Status>,
            given_up: &[String],
        ) -> Result<(), Failure> {
            let promises = granted.values().flat_map(|status| &status.promises);
            let (mut newest, mut earlier) = (self.version, Earlier::default());
            for promise in promises.filter(|it| it.version.coordinator != self.version.coordinator) {
                // What another store's nodes go by says nothing here.
                let bound = |node: &String| {
                    granted.get(node).map_or(given_up.contains(node), |it| {
                        it.store != promise.store || it.version < Some(promise.version)
                    })
                };
                // By force, the new epoch must be above any that another has begun.
                newest.epoch = newest.epoch.max(promise.version.epoch);
                earlier.nodes.extend(promise.nodes.iter().cloned());
                if promise.nodes.iter().all(bound) {
                    earlier.void.push(promise.version);
                }
            }
            let newer = |status: &Status| status.store == Some(base.store) && status.version > Some(base.version);
            let outdated = granted.values().any(newer) || self.world.with(|node| node.version()) != Some(base.version);
            match earlier.nodes.is_empty() && !outdated {
                true => Ok(()),
                false => Err(Failure::Again(newest, earlier, Outcome::ChangeUnderWay)),
            }
        }

        /// Checks that all go by the table in force and wait for nothing. Returns whether that table is complete, so that its sources
        /// need not be sources of the next one.
        fn check_nodes(
            &self,
            base: &Table,
            view: &[String],
            granted: &BTreeMap<String, Status>,
            given_up: &[String],
        ) -> Result<bool, Failure> {
            let known_complete = self.world.with(|node| node.is_complete());
            let mut complete = given_up.is_empty();
            for (node, status) in granted {
                // A source that has not heard of the base would drop what it has when it hears of the next table. A blank node
                // has lost what it had, and will go by the next table.
                let takes_part = base.lists(node) || !known_complete && base.sources().contains(node);
                if takes_part && status.version.is_some_and(|version| version != base.version) {
                    return Err(self.again(Outcome::ChangeUnderWay));
                } else if view.contains(node) && !base.lists(node) {
                    self.check_joining(node, status, base)?;
                }
                if self.wanted.is_some()
                    && let Some(source) = status.incoming.iter().find(|it| !given_up.contains(it))
                {
                    return Err(self.again(match granted.contains_key(source) {
                        true => Outcome::ChangeUnderWay,
                        false => Outcome::NodeDown(source.clone()),
                    }));
                }
                complete &= status.incoming.is_empty() && !(base.lists(node) && status.version.is_none());
            }
            Ok(complete || known_complete)
        }

        /// Learns the givers' cuts. All are asked: one that has started again since it was locked refuses.
        async fn cut(
            &self,
            moves: &[table::Move],
            speakers: &[Option<String>],
            nodes: Vec<String>,
            complete: bool,
        ) -> Result<Vec<Cut>, Failure> {
            let from = |node: &String| -> Vec<&table::Move> {
                moves.iter().filter(|(giver, ..)| speakers[*giver].as_ref() == Some(node)).collect()
            };
            let counts = |node: &String| {
                let mut sum = 0;
                let add = |(_, _, count): &table::Move| {
                    sum += count;
                    sum
                };
                from(node).into_iter().map(add).collect()
            };
            let message = |node: &String| (node.clone(), Message::Cut(self.version, counts(node), complete));
            let replies = ask_each(self.world, nodes.iter().map(message).collect()).await;
            let mut cuts = Vec::new();
            for (node, reply) in nodes.iter().zip(replies) {
                let places = match reply {
                    Some((_, Reply::Places(places))) => places,
                    Some(_) => return Err(self.again(Outcome::ChangeUnderWay)),
                    None => return Err(self.again(Outcome::NodeDown(node.clone()))),
                };
                for ((giver, receiver, _), place) in from(node).into_iter().zip(places) {
                    cuts.push(Cut { giver: *giver, place, receiver: *receiver });
                }
            }
            Ok(cuts)
        }
    }

    /// The replica of a shard that is to tell what the shard has, and where its cuts are: one that lacks nothing, if there is one.
    fn speaker(base: &Table, granted: &BTreeMap<String, Status>, shard: usize) -> Option<String> {
        let mut answering = base.replicas(shard);
        answering.retain(|node| granted.contains_key(node));
        answering.sort_by_key(|node| !may_speak(base, &granted[node]));
        answering.into_iter().next()
    }

    /// Whether a node can speak for its shard: it goes by this table, and lacks nothing that it needs.
    fn may_speak(base: &Table, status: &Status) -> bool {
        status.version == Some(base.version) && status.waits_for.is_empty()
    }

    /// What is known of a node while the keys that a table moves arrive.
    struct Awaited {
        name: String,
        has_arrived: bool,
        /// When it last answered.
        heard: Duration,
        /// From whom it still had to fetch then.
        needs: Vec<String>,
    }

    /// Waits until all nodes have fetched what a table gives them. Returns the nodes that are not reached: that have not
    /// answered for a while, and without which nothing gets on.
    async fn await_arrival(world: &impl World, table: &Table) -> Vec<String> {
        let now = || world.with(|node| node.now);
        let names: Vec<String> = set_of(table.view.iter().cloned().chain(table.sources())).into_iter().collect();
        let await_one = |name: &String| Awaited {
            name: name.clone(),
            has_arrived: !table.lists(name),
            heard: now(),
            needs: Vec::new(),
        };
        let (mut nodes, mut pause): (Vec<Awaited>, u64) = (names.iter().map(await_one).collect(), 2);
        loop {
            for (node, reply) in nodes.iter_mut().zip(ask(world, &names, Message::Meet).await) {
                let Some((status, _)) = reply else { continue };
                if status.version > Some(table.version) {
                    return Vec::new();
                }
                node.has_arrived |=
                    status.version == Some(table.version) && (status.complete || status.incoming.is_empty());
                (node.heard, node.needs) = (now(), status.incoming);
            }
            let waiting: Vec<&Awaited> = nodes.iter().filter(|node| !node.has_arrived).collect();
            if waiting.is_empty() {
                complete(world, table);
                ask(world, &names, Message::Meet).await;
                return Vec::new();
            }
            let is_silent = |name: &String| nodes.iter().any(|it| it.name == *name && it.heard + UNREACHED < now());
            let is_stuck =
                |it: &&Awaited| is_silent(&it.name) || !it.needs.is_empty() && it.needs.iter().all(is_silent);
            if waiting.iter().all(is_stuck) {
                let named = waiting.iter().flat_map(|it| it.needs.iter().chain([&it.name]));
                let named = named.filter(|name| is_silent(name));
                return set_of(named.cloned()).into_iter().collect();
            }
            world.sleep(Duration::from_millis(pause)).await;
            pause = (pause * 2).min(200);
        }
    }
}

// ---- The node in the world: its lock, its clock, its messages -------------------------------------------------------

/// What this instance holds, and what it knows of the other nodes. A std Mutex and not a coroutine's: nobody waits for
/// anything while holding it.
static NODE: LazyLock<Mutex<Node>> = LazyLock::new(|| {
    let own = own().unwrap_or_default().to_owned();
    Mutex::new(Node::new(own, SETTINGS.view.clone(), SETTINGS.factor, random(), now()))
});

/// The time since 1970 at the start, and since then by a clock that nobody sets.
fn now() -> Duration {
    static START: LazyLock<(Instant, Duration)> = LazyLock::new(|| {
        (Instant::now(), SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
    });
    START.1 + START.0.elapsed()
}

/// A view change that is passed on to a node of the store may take as long as it takes.
const CHANGE_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

// (Not inlined, as `let_go`: there are a hundred places that look at the node.)
#[inline(never)]
fn lock_node() -> MutexGuard<'static, Node> {
    let mut node = lock(&NODE);
    node.now = now();
    node
}

/// Lines for stderr, and records to be dropped.
type Leftovers = (Vec<String>, Vec<Records>);

/// To the thread that deals with leftovers, one after the other, so that lines stay in order. To drop many records takes a while.
static LEFTOVERS: LazyLock<mpsc::Sender<Leftovers>> = LazyLock::new(|| {
    let (sender, receiver) = mpsc::channel::<Leftovers>();
    thread::spawn(move || {
        for (lines, garbage) in receiver {
            lines.iter().for_each(|line| say(line));
            let freed: usize = garbage.iter().map(Records::footprint).sum();
            drop(garbage);
            FREED.fetch_add(freed as u64, SeqCst);
        }
    });
    sender
});

/// Unlocks the node, and hands on the lines and the records that it wants to be rid of.
#[inline(never)]
fn let_go(mut node: MutexGuard<Node>) {
    if !node.lines.is_empty() || !node.garbage.is_empty() {
        // Still locked, so that they are in the channel in the order in which they came about.
        let _ = LEFTOVERS.send((std::mem::take(&mut node.lines), std::mem::take(&mut node.garbage)));
    }
}

/// The world that this program runs in, as opposed to the one of the simulation.
#[derive(Clone, Copy)]
struct Live;

impl World for Live {
    fn with<T>(&self, action: impl FnOnce(&mut Node) -> T) -> T {
        let mut node = lock_node();
        let result = action(&mut node);
        let_go(node);
        result
    }

    async fn deliver(&self, envelopes: Vec<Envelope>) -> Vec<Option<(Status, Reply)>> {
        // All are asked before the first is waited for.
        let questions: Vec<Option<Question>> = envelopes.iter().map(begin_to_deliver).collect();
        let answers = envelopes.into_iter().zip(questions).map(|(envelope, question)| match question {
            None if own() == Some(&envelope.to) => Some(receive(self, envelope)),
            question => read_reply(&question?.answer().ok()?),
        });
        answers.collect()
    }

    async fn push(&self, pushes: Vec<Push>) -> Vec<Option<Pushed>> {
        let begin = |push: &Push| {
            let body = postcard::to_stdvec(push).ok()?;
            let message = Request { origin: Origin::Push, body, ..Request::default() };
            Peer::at(&push.to).begin(message, PUSH_LIMIT).ok()
        };
        // All are asked before the first is waited for.
        let questions: Vec<Option<Question>> = pushes.iter().map(begin).collect();
        let answer = |question: Option<Question>| postcard::from_bytes(&question?.answer().ok()?.body).ok();
        questions.into_iter().map(answer).collect()
    }

    async fn relay(&self, node: &str, request: Request, patience: Duration) -> Result<Answer, Lost> {
        Peer::at(node).relay(request, patience)
    }

    async fn sleep(&self, time: Duration) {
        pause(time);
    }

    fn spawn(&self, activity: Activity) {
        if let Activity::Tell = activity {
            // It is short, and as frequent as writes.
            may::go!(move || block_on(run(Live, activity)));
            return;
        }
        let spawn = |activity| thread::Builder::new().spawn(move || block_on(run(Live, activity)));
        while spawn(activity.clone()).is_err() {
            // The system has no room for another thread now.
            pause(Duration::from_millis(100));
        }
    }
}

/// Runs a future whose waits all block: it is ready when it is polled once.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    // (Not in a Box: large allocations are slow.)
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return result;
        }
    }
}

/// A replica that does not take a push in this time is silent.
const PUSH_LIMIT: Duration = Duration::from_millis(1200);

/// Stores what another replica pushes, if it is for this node.
#[inline(never)]
fn answer_push(body: &[u8]) -> Answer {
    match postcard::from_bytes::<Push>(body) {
        Ok(push) if own() == Some(&push.to) => Answer::message(&Live.with(|node| node.take_push(push))),
        _ => Outcome::BadRequest.answer(Vocabulary::Form, "POST"),
    }
}

/// Asks another node. None if it cannot be asked, or is this one.
fn begin_to_deliver(envelope: &Envelope) -> Option<Question> {
    if own() == Some(&envelope.to) {
        return None;
    }
    let body = postcard::to_stdvec(envelope).ok()?;
    let message = Request { origin: Origin::Message, body, ..Request::default() };
    let mut limit = envelope.message.limit();
    if matches!(envelope.message, Message::Meet) {
        // In a large store that starts, all ask all.
        limit = limit.max(Duration::from_millis(40) * SETTINGS.view.len() as u32);
    }
    Peer::at(&envelope.to).begin(message, limit).ok()
}

fn read_reply(answer: &Answer) -> Option<(Status, Reply)> {
    postcard::from_bytes(&answer.body).ok().filter(|(status, _): &(Status, Reply)| status.is_plain())
}

/// Answers a message, if it is one and for this node; in the background, unless it is a mere meeting: much may be looked for.
#[inline(never)]
fn answer_message(body: &[u8]) -> Result<Answer, Work> {
    match postcard::from_bytes::<Envelope>(body) {
        Ok(envelope)
            if own() == Some(&envelope.to) && port_of(&envelope.from).is_some() && envelope.status.is_plain() =>
        {
            let is_short = matches!(envelope.message, Message::Meet);
            let work = move || Answer::message(&receive(&Live, envelope));
            let in_vain = |_| Outcome::MainDown.answer(Vocabulary::Form, "POST");
            if is_short {
                Ok(work())
            } else {
                Err(Box::new(move || in_background(move || Ok(work())).unwrap_or_else(in_vain)))
            }
        }
        _ => Ok(Outcome::BadRequest.answer(Vocabulary::Form, "POST")),
    }
}

// ---- Streams: what instances say to one another, in frames ----------------------------------------------------------

mod streams {
    //! attohttpc opens a connection for each request, but a request's body need not end, nor does an answer's, and its socket can
    //! be used without it. Such a request makes a *stream* from one instance to another: its body carries what is asked, its answer
    //! what is answered, in any order. Both go in frames: a number that question and answer share, a length, whether the message
    //! ends here, and so much of it. This is what both ends have in common; `relay` is the end that asks, and what is asked is
    //! answered beside the connections, in `answering`. (A stream of two requests, one for each direction, would need one and a
    //! half times as many packets: what comes and what goes could not acknowledge each other.)
    //!
    //! Who is asked sends nothing but the head of its answer before it was asked something: attohttpc might read that as well, and
    //! keep it.

    use super::*;

    /// The media type of the request and of its answer.
    pub const STREAM: &str = "application/x-kv-store-stream";
    /// What is proven to whoever is asked, and to whoever asks.
    pub const REQUESTS: &str = "requests";
    pub const ANSWERS: &str = "answers";
    /// The length of the request's body. No stream carries as much.
    pub const ENDLESS: u64 = 1 << 62;
    /// How many bytes of a message a frame carries at most: whatever is small passes between the frames of what is large.
    pub const FRAME: usize = 64 << 10;
    const HEAD: usize = 13;
    /// How many bytes a message may have: an answer, or a request with its head.
    pub const MAX_MESSAGE: usize = 17 << 20;
    /// How often whoever is asked gives a sign of life: a frame with a number that no message has.
    pub const SIGN_OF_LIFE: Duration = Duration::from_millis(400);
    const NO_NUMBER: u64 = 0;

    /// Proves to the other end of a stream that this one knows the secret, without telling it: any client can have a node open a
    /// stream to anywhere, by naming it in a view. The proof is good for this stream (its `id`) and this `purpose`, which names the
    /// direction and the node that is asked: what one node answers proves nothing in the name of another. (SipHash is made to be
    /// a code for messages under a secret key.) None without a secret.
    pub fn proof(id: &str, purpose: &str) -> Option<String> {
        let secret = SETTINGS.secret.as_ref()?;
        let key = sip128::SipHasher24::new().hash(secret.as_bytes());
        let code = sip128::SipHasher24::new_with_keys(key.h1, key.h2).hash(format!("{id} {purpose}").as_bytes());
        Some(format!("{:032x}", code.as_u128()))
    }

    /// Whether what the other end sent is that proof; also where there is no secret to be proven. Comparing takes as long whatever
    /// was sent.
    pub fn is_proven(given: &[u8], id: &str, purpose: &str) -> bool {
        proof(id, purpose).is_none_or(|proof| proof.as_bytes().ct_eq(given).into())
    }

    /// What is to be written on a stream: messages, and in between, one after the other, the large ones in pieces.
    #[derive(Default)]
    pub struct Outbox {
        frames: Vec<u8>,
        large: VecDeque<(u64, Vec<u8>)>,
        /// How many bytes of the first large one have been taken.
        taken: usize,
        /// Somebody writes, and takes along what comes in here meanwhile.
        has_writer: bool,
        /// How many bytes they are writing.
        being_written: usize,
    }

    impl Outbox {
        /// Puts a message in that takes about `size` bytes.
        pub fn push(&mut self, number: u64, message: &impl Serialize, size: usize) {
            // Writing to a Vec cannot fail.
            let message = postcard::to_extend(message, Vec::with_capacity(size)).unwrap_or_default();
            if message.len() <= FRAME {
                put_frame(&mut self.frames, number, &message, true);
            } else {
                self.large.push_back((number, message));
            }
        }

        pub fn give_sign_of_life(&mut self) {
            put_frame(&mut self.frames, NO_NUMBER, &[], true);
        }

        pub fn has_large(&self) -> bool {
            !self.large.is_empty()
        }

        /// How many bytes are to be written, or being written.
        pub fn length(&self) -> u64 {
            let large: usize = self.large.iter().map(|(_, message)| message.len()).sum();
            (self.being_written + self.frames.len() + large - self.taken) as u64
        }

        /// Whether this is enough for one write.
        pub fn has_enough(&self) -> bool {
            self.frames.len() >= FRAME
        }

        /// Makes the caller the writer, unless there is one. True if it is to call `write_from` now.
        pub fn claim(&mut self) -> bool {
            !std::mem::replace(&mut self.has_writer, true)
        }

        /// What the next write should write. None ends the writing.
        pub fn next(&mut self) -> Option<Vec<u8>> {
            self.has_writer = !self.frames.is_empty() || self.has_large();
            if !self.has_writer {
                self.being_written = 0;
                return None;
            }
            // What comes next is often as long.
            let empty = Vec::with_capacity(self.frames.len());
            let mut bytes = std::mem::replace(&mut self.frames, empty);
            if let Some((number, message)) = self.large.front() {
                let end = message.len().min(self.taken + FRAME);
                let is_last = end == message.len();
                put_frame(&mut bytes, *number, &message[self.taken..end], is_last);
                self.taken = if is_last { 0 } else { end };
                if is_last {
                    self.large.pop_front();
                }
            }
            self.being_written = bytes.len();
            Some(bytes)
        }
    }

    /// Writes what `next` has until it has nothing, and never waits: what the kernel does not take at once is left to a coroutine.
    /// `fail` is for a stream that breaks, or takes nothing for long.
    pub fn write_from(
        stream: Arc<TcpStream>,
        next: impl Fn(&Arc<TcpStream>) -> Option<Vec<u8>> + Send + 'static,
        fail: impl FnOnce(&Arc<TcpStream>) + Send + 'static,
    ) {
        while let Some(bytes) = next(&stream) {
            match write_now(&stream, &bytes) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(sent) => {
                    return drop(may::go!(move || match write_waiting(&stream, &bytes[sent..]) {
                        Ok(()) => write_from(stream, next, fail),
                        Err(_) => fail(&stream),
                    }));
                }
                Err(_) => return fail(&stream),
            }
        }
    }

    fn put_frame(out: &mut Vec<u8>, number: u64, piece: &[u8], is_last: bool) {
        out.extend(number.to_le_bytes());
        out.extend((piece.len() as u32).to_le_bytes());
        out.push(is_last.into());
        out.extend(piece);
    }

    /// The first frame of some bytes (its number, whether it is a message's last, and the piece), and the bytes after it.
    fn first_frame(bytes: &[u8]) -> Option<(u64, bool, &[u8], &[u8])> {
        let (number, rest) = bytes.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let (is_last, rest) = rest.split_first()?;
        let (piece, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        Some((u64::from_le_bytes(*number), *is_last == 1, piece, rest))
    }

    /// Puts messages together from the frames that arrive.
    #[derive(Default)]
    struct Inbox {
        /// The beginning of a frame.
        begun: Vec<u8>,
        large: Option<(u64, Vec<u8>)>,
    }

    impl Inbox {
        /// Takes in what arrived, and returns the messages that are whole now, with their numbers. None: these are no frames, or
        /// no such messages.
        fn take_in<T: DeserializeOwned>(&mut self, arrived: &[u8]) -> Option<Vec<(u64, T)>> {
            let mut whole = Vec::new();
            let Inbox { begun, large } = self;
            begun.extend(arrived);
            let mut rest = &begun[..];
            while let Some((number, is_last, piece, after)) = first_frame(rest) {
                rest = after;
                match large {
                    Some((of, message)) if *of == number => {
                        message.extend(piece);
                        if message.len() > MAX_MESSAGE {
                            return None;
                        }
                        if is_last {
                            whole.push((number, postcard::from_bytes(message).ok()?));
                            *large = None;
                        }
                    }
                    _ if is_last && number == NO_NUMBER => {}
                    _ if is_last => whole.push((number, postcard::from_bytes(piece).ok()?)),
                    // Large messages come one after the other.
                    Some(_) => return None,
                    None => *large = Some((number, piece.to_vec())),
                }
            }
            let left = rest.len();
            begun.drain(..begun.len() - left);
            (left < FRAME + HEAD).then_some(whole)
        }
    }

    /// Hands on the messages that each read of a socket brings, with their numbers, until the stream ends, brings what is none, or one
    /// makes a panic. After `turn` bytes, others have their turn.
    pub fn read_from<T>(
        socket: &TcpStream,
        reader: &mut impl BufRead,
        turn: u64,
        mut hand_on: impl FnMut(Vec<(u64, T)>),
    ) where
        T: DeserializeOwned,
    {
        let (mut inbox, mut served) = (Inbox::default(), 0);
        let mut read = || {
            let arrived = reader.fill_buf().ok().filter(|arrived| !arrived.is_empty())?;
            let (count, messages) = (arrived.len(), inbox.take_in(arrived)?);
            reader.consume(count);
            hand_on(messages);
            served += count as u64;
            take_turn(socket, &mut served, turn);
            Some(())
        };
        while let Ok(Some(())) = catch_unwind(AssertUnwindSafe(&mut read)) {}
    }
}

// ---- The relay: taking a request to the instance that owns it -------------------------------------------------------

mod relay {
    //! A request to a peer stands in its queue until a stream to the peer, or a thread, takes it. A stream takes whatever is
    //! queued; it is opened when there is something to send, and closed when there was nothing for a moment. Nodes
    //! take streams, and so does a main instance that says so in its answers (`Accept-Post`). To any other main instance the
    //! requests go one by one, each from a thread that is blocked meanwhile.

    use super::*;

    /// A peer that is gone is reported within 1.5 s (the contract, "A follower"): a connection must come about before.
    const CONNECT_LIMIT: Duration = Duration::from_millis(1100);
    /// A peer that accepts and never answers is reported within 5 s.
    pub const ANSWER_LIMIT: Duration = Duration::from_millis(4200);
    /// How long a request may take in all, on its way through other instances and back.
    pub const PATIENCE: Duration = Duration::from_millis(4400);
    /// After this long a silence on a stream it is found out whether the peer's host is still there.
    const SILENCE: Duration = Duration::from_millis(650);
    /// How long it may take to look a name up; and to connect, when it is found out whether a host is there.
    const LOOK_LIMIT: Duration = Duration::from_millis(700);
    /// A stream is closed after this long without a request. Between neighbours, which meet more often, it stays open.
    const REST: Duration = Duration::from_millis(400);
    /// How many threads may be waiting for answers of a peer that takes no streams.
    const MAX_THREADS: usize = 64;
    /// How many bytes of answers are taken from a stream before others have their turn. (With fewer, a stream that has just been
    /// opened is read too slowly for its buffers, which are still small: packets get lost, and are sent again much later.)
    const ANSWERED: u64 = 4 << 20;
    /// More is no answer to any request of the contract.
    const MAX_ANSWER: u64 = 16 << 20;
    /// What is said of a connection that does not come about.
    const NO_WAY: [io::ErrorKind; 5] =
        [AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut];
    /// For how long a name is taken to stand for the same address.
    const LOOKUP_LIFETIME: Duration = Duration::from_secs(1);

    /// This process, in the `Via` of what it relays: a request that comes back with it runs in a ring.
    static VIA: LazyLock<String> = LazyLock::new(|| format!("1.1 kv-store-{:016x}", random()));

    const MAX_STRANGERS: usize = 1000;
    /// The nodes of which it was said that they do not know the secret: it is said once.
    static STRANGERS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

    static PEERS: LazyLock<Mutex<HashMap<String, Arc<Peer>>>> = LazyLock::new(Default::default);

    /// Another instance, and what is on its way there.
    #[derive(Default)]
    pub struct Peer {
        /// Its `host:port`.
        address: String,
        traffic: Mutex<Traffic>,
        /// What the name in the address last stood for.
        lookup: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    }

    #[derive(Default)]
    struct Traffic {
        takes_streams: bool,
        /// Requests of which nothing was sent yet, by their numbers.
        queue: VecDeque<(u64, Request)>,
        /// Who waits for the answer to which request.
        waiters: HashMap<u64, Waiting>,
        last_number: u64,
        /// The threads that take requests to the peer one by one.
        threads: usize,
        stream: State,
        outbox: Outbox,
        /// When something was last asked, when something last came on the stream, and when the peer's host was last looked for.
        asked: Option<Instant>,
        heard: Option<Instant>,
        looked: Option<Instant>,
    }

    /// Dropping it wakes who waits, with an answer or without. It is never dropped by who holds a lock: a coroutine that is woken while
    /// it parks goes on inside the call that parks it, and to drop its Blocker waits for that call to return. If the coroutine came to
    /// want the lock, both would wait for ever.
    struct Waiting<T = Answer> {
        waiter: Arc<Waiter<T>>,
        deadline: Instant,
        /// The request was given to the stream.
        on_stream: bool,
    }

    /// A coroutine, or a thread, that waits for an answer.
    struct Waiter<T = Answer> {
        blocker: Blocker,
        answer: Mutex<Option<T>>,
        /// The request was given to a stream, or a thread, so that it may have got there.
        was_sent: AtomicBool,
    }

    /// What was asked of a peer.
    pub struct Question<T = Answer>(Arc<Waiter<T>>);

    impl<T> Question<T> {
        /// Waits for the answer.
        pub fn answer(self) -> Result<T, Lost> {
            // The watch ends this at the deadline: a timer for each request would cost more than the rest of the relay.
            let _ = self.0.blocker.park(None);
            lock(&self.0.answer).take().ok_or(Lost { was_sent: self.0.was_sent.load(SeqCst) })
        }
    }

    /// What is done in the background, and who waits for it.
    type Task = (Box<dyn FnOnce() -> Result<Answer, Work> + Send>, Waiting<Result<Answer, Work>>);

    /// To the threads that do what would hold up all coroutines. They are few: many would compete with the worker.
    static BACKGROUND: LazyLock<mpsc::Sender<Task>> = LazyLock::new(|| {
        let (sender, receiver) = mpsc::channel::<Task>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..2 {
            let receiver = receiver.clone();
            repeat(Duration::ZERO, move || {
                let next = lock(&receiver).recv();
                if let Ok((work, waiting)) = next {
                    waiting.deliver(work());
                }
            });
        }
        sender
    });

    /// Has a thread do something while the calling coroutine waits. Work that waits for others comes back, for the coroutine to do: the
    /// threads only compute. An error is a panic.
    pub fn in_background(work: impl FnOnce() -> Result<Answer, Work> + Send + 'static) -> Result<Answer, Lost> {
        let waiter = Waiter::new();
        let waiting = Waiting { waiter: waiter.clone(), deadline: Instant::now(), on_stream: false };
        // However this ends, `waiting` is dropped then.
        let _ = BACKGROUND.send((Box::new(work), waiting));
        Ok(Question(waiter).answer()?.unwrap_or_else(|work| work()))
    }

    impl<T> Waiter<T> {
        fn new() -> Arc<Waiter<T>> {
            Arc::new(Waiter { blocker: Blocker::new(false), answer: Mutex::default(), was_sent: false.into() })
        }
    }

    impl<T> Drop for Waiting<T> {
        fn drop(&mut self) {
            self.waiter.blocker.unpark();
        }
    }

    impl<T> Waiting<T> {
        fn deliver(self, answer: T) {
            *lock(&self.waiter.answer) = Some(answer);
        }
    }

    #[derive(Default)]
    enum State {
        #[default]
        Closed,
        Opening,
        Open(Arc<TcpStream>),
    }

    /// Why a stream was not opened.
    enum NotOpened {
        NoAnswer,
        /// The peer answers, and is to be asked without streams.
        TakesNone,
    }

    impl<E: Into<attohttpc::Error>> From<E> for NotOpened {
        fn from(_: E) -> NotOpened {
            NotOpened::NoAnswer
        }
    }

    fn is_past(time: Option<Instant>, limit: Duration) -> bool {
        time.is_some_and(|time| time.elapsed() > limit)
    }

    /// These get no answer. A coroutine tells them, since who calls this holds a lock.
    fn give_up(waiting: Vec<Waiting>) {
        if !waiting.is_empty() {
            may::go!(move || drop(waiting));
        }
    }

    impl Traffic {
        fn is_open(&self, stream: &Arc<TcpStream>) -> bool {
            matches!(&self.stream, State::Open(open) if Arc::ptr_eq(open, stream))
        }

        /// Moves requests from the queue to the outbox, as many as one write takes, and of large ones one at a time.
        fn fill_outbox(&mut self) {
            let mut index = 0;
            while index < self.queue.len() && !self.outbox.has_enough() {
                if self.queue[index].1.size() > FRAME && self.outbox.has_large() {
                    index += 1;
                } else if let Some((number, request)) = self.queue.remove(index)
                    && let Some(waiting) = self.waiters.get_mut(&number)
                {
                    waiting.waiter.was_sent.store(true, SeqCst);
                    waiting.on_stream = true;
                    self.outbox.push(number, &request, request.size());
                }
            }
        }

        /// Whoever waits for what is queued gets no answer.
        fn give_up_queue(&mut self) {
            let queued = self.queue.drain(..);
            give_up(queued.filter_map(|(number, _)| self.waiters.remove(&number)).collect());
        }

        /// Closes the stream: what was given to it gets no answer, and what is still queued goes on the next one.
        fn close(&mut self) {
            if let State::Open(stream) = std::mem::take(&mut self.stream) {
                let _ = stream.shutdown(Shutdown::Both);
            }
            self.outbox = Outbox::default();
            give_up(self.waiters.extract_if(|_, waiting| waiting.on_stream).map(|(_, waiting)| waiting).collect());
        }
    }

    impl Peer {
        pub fn at(address: &str) -> Arc<Peer> {
            let mut peers = lock(&PEERS);
            if let Some(known) = peers.get(address) {
                return known.clone();
            }
            let traffic = Mutex::new(Traffic { takes_streams: own().is_some(), ..Traffic::default() });
            let peer = Arc::new(Peer { address: address.into(), traffic, ..Peer::default() });
            peers.insert(address.into(), peer.clone());
            peer
        }

        /// Takes a request to the peer and returns its answer; an error if there is none in time, or the request runs in a ring.
        /// The request is sent once at most.
        pub fn relay(self: Arc<Peer>, request: Request, patience: Duration) -> Result<Answer, Lost> {
            let result = self.ask(request, patience);
            RELAYED.fetch_add(1, Relaxed);
            RELAYED_IN_VAIN.fetch_add(result.is_err().into(), Relaxed);
            result
        }

        /// Takes what is no client's request to the peer, and returns its answer.
        pub fn ask(self: Arc<Peer>, request: Request, patience: Duration) -> Result<Answer, Lost> {
            self.begin(request, patience)?.answer()
        }

        /// Begins to ask: what others are asked meanwhile goes on beside it.
        pub fn begin(self: Arc<Peer>, mut request: Request, patience: Duration) -> Result<Question, Lost> {
            if request.via.split(',').any(|hop| hop.trim() == *VIA) {
                return Err(Lost { was_sent: false });
            }
            request.via = if request.via.is_empty() { VIA.clone() } else { format!("{}, {}", request.via, *VIA) };
            let now = Instant::now();
            let waiter = Waiter::new();
            let mut traffic = lock(&self.traffic);
            traffic.last_number += 1;
            traffic.asked = Some(now);
            let number = traffic.last_number;
            traffic
                .waiters
                .insert(number, Waiting { waiter: waiter.clone(), deadline: now + patience, on_stream: false });
            traffic.queue.push_back((number, request));
            self.dispatch(traffic);
            Ok(Question(waiter))
        }

        /// Sees to it that somebody takes what is queued.
        fn dispatch(self: &Arc<Peer>, mut traffic: MutexGuard<Traffic>) {
            let peer = self.clone();
            match &traffic.stream {
                State::Open(stream) => {
                    let (stream, is_alone) = (stream.clone(), traffic.waiters.len() == 1);
                    let is_to_write = traffic.outbox.claim();
                    drop(traffic);
                    let write = move || peer.write_queue(stream);
                    if is_to_write && is_alone {
                        write();
                    } else if is_to_write {
                        // It runs after the coroutines that are ready now, and takes along what these queue.
                        may::go!(write);
                    }
                }
                State::Closed if traffic.takes_streams => {
                    traffic.stream = State::Opening;
                    if thread::Builder::new().spawn(move || peer.open_stream()).is_err() {
                        traffic.stream = State::Closed;
                        traffic.give_up_queue();
                    }
                }
                State::Closed if traffic.threads < MAX_THREADS => {
                    traffic.threads += 1;
                    if thread::Builder::new().spawn(move || peer.send_plainly()).is_err() {
                        traffic.threads -= 1;
                        traffic.give_up_queue();
                    }
                }
                _ => {}
            }
        }

        // -- A peer that takes streams

        /// Opens a stream, and has a coroutine read what comes there.
        fn open_stream(self: Arc<Peer>) {
            // After a panic, there was no stream.
            let opened = catch_unwind(AssertUnwindSafe(|| self.open())).unwrap_or(Err(NotOpened::NoAnswer));
            let mut traffic = lock(&self.traffic);
            match opened {
                Ok((stream, reader)) => {
                    traffic.stream = State::Open(stream.clone());
                    traffic.heard = Some(Instant::now());
                    let peer = self.clone();
                    may::go!(move || peer.read_answers(&stream, reader));
                    self.dispatch(traffic);
                }
                Err(NotOpened::NoAnswer) => {
                    traffic.stream = State::Closed;
                    traffic.give_up_queue();
                    drop(traffic);
                    self.forget_addresses();
                }
                Err(NotOpened::TakesNone) => {
                    (traffic.stream, traffic.takes_streams) = (State::Closed, false);
                    let left = traffic.queue.len();
                    drop(traffic);
                    (0..left.min(MAX_THREADS)).for_each(|_| self.dispatch(lock(&self.traffic)));
                }
            }
        }

        /// Opens a stream. Returns it, and what its answers can be read from.
        fn open(&self) -> Result<(Arc<TcpStream>, may::net::TcpStream), NotOpened> {
            let host = self.host().ok_or(NotOpened::NoAnswer)?;
            if own().is_none() {
                // By now another program may listen there, and would wait for the body's end: it is asked first.
                let greeting = Request { via: VIA.clone(), ..Request::default() }.as_greeting();
                let (_, takes_streams) = greeting.send(&host, ANSWER_LIMIT)?;
                if !takes_streams {
                    return Err(NotOpened::TakesNone);
                }
            }
            let id = format!("{:016x}", random());
            let url = format!("http://{host}/kv-store?stream={id}");
            // The client sends no body then: that is up to whoever has the stream.
            let builder = client("POST", &url, ANSWER_LIMIT)?.try_header("Content-Length", ENDLESS)?;
            let mut builder = builder.try_header("Content-Type", STREAM)?;
            if let Some(proof) = proof(&id, &format!("{REQUESTS} {}", self.address)) {
                builder = builder.bearer_auth(proof);
            }
            let response = builder.send()?;
            let stream = last_sent_on()?;
            let proven = response.headers().get("Authentication-Info").map_or("".as_bytes(), HeaderValue::as_bytes);
            let is_proven = is_proven(proven, &id, &format!("{ANSWERS} {}", self.address));
            let takes_streams = response.headers().get("Content-Type").is_some_and(|it| it == STREAM);
            if response.status() == StatusCode::FORBIDDEN || takes_streams && !is_proven {
                self.say_that_it_is_a_stranger();
            }
            if !takes_streams || !is_proven {
                // A node is never asked without a stream: one that takes none from here is of another store.
                return Err(if own().is_some() { NotOpened::NoAnswer } else { NotOpened::TakesNone });
            }
            let reader = waiting_stream(&stream, None)?;
            Ok((Arc::new(stream), reader))
        }

        /// Says once, as long as there are not very many of them, that a node does not know the secret.
        fn say_that_it_is_a_stranger(&self) {
            let mut strangers = lock(&STRANGERS);
            if strangers.len() < MAX_STRANGERS && strangers.insert(self.address.clone()) {
                say(&format!("node {} is of another store: its SECRET is another one", self.address));
            }
        }

        /// Writes what is queued on the stream, until nothing is.
        fn write_queue(self: Arc<Peer>, stream: Arc<TcpStream>) {
            let peer = self.clone();
            let next = move |stream: &_| {
                let mut traffic = lock(&self.traffic);
                if !traffic.is_open(stream) {
                    return None;
                }
                traffic.fill_outbox();
                traffic.outbox.next()
            };
            write_from(stream, next, move |stream| peer.end_stream(stream));
        }

        /// Hands on the answers that come on a stream, until it ends.
        fn read_answers(self: Arc<Peer>, stream: &Arc<TcpStream>, reader: may::net::TcpStream) {
            let mut reader = BufReader::with_capacity(FRAME, reader);
            read_from(stream, &mut reader, ANSWERED, |answers| self.hand_on(answers));
            self.end_stream(stream);
        }

        fn end_stream(self: &Arc<Peer>, stream: &Arc<TcpStream>) {
            let traffic = lock(&self.traffic);
            if traffic.is_open(stream) {
                self.close(traffic);
            }
        }

        /// Closes the stream, and sees to what is still queued.
        fn close(self: &Arc<Peer>, mut traffic: MutexGuard<Traffic>) {
            traffic.close();
            if !traffic.queue.is_empty() {
                self.dispatch(traffic);
            }
        }

        fn hand_on(&self, answers: Vec<(u64, Answer)>) {
            let mut traffic = lock(&self.traffic);
            traffic.heard = Some(Instant::now());
            let answered: Vec<_> = answers
                .into_iter()
                .filter_map(|(number, answer)| Some((traffic.waiters.remove(&number)?, answer)))
                .collect();
            drop(traffic);
            answered.into_iter().for_each(|(waiting, answer)| waiting.deliver(answer));
        }

        /// Finds out whether the host of a silent peer is still there. Ends the stream if it is not, and one that has been silent
        /// for too long: its packets may be lost where those of new connections are not.
        fn look_for(self: Arc<Peer>, stream: Arc<TcpStream>) {
            // (The name may stand for another host by now.)
            let is_there = |address: SocketAddr| TcpStream::connect_timeout(&address, LOOK_LIMIT).is_ok();
            let gone = !stream.peer_addr().is_ok_and(is_there);
            if gone {
                self.forget_addresses();
            }
            let mut traffic = lock(&self.traffic);
            if traffic.is_open(&stream) && (gone || is_past(traffic.heard, ANSWER_LIMIT)) {
                if gone {
                    traffic.give_up_queue();
                }
                self.close(traffic);
            }
        }

        // -- Requests one by one

        /// Takes requests to the peer, one at a time, until none is queued.
        fn send_plainly(self: Arc<Peer>) {
            let mut traffic = lock(&self.traffic);
            while !traffic.takes_streams
                && let Some((number, request)) = traffic.queue.pop_front()
            {
                let Some(waiting) = traffic.waiters.get(&number) else { continue };
                // What only a stream can carry waits until it is known whether the peer takes them.
                let needs_stream = request.needs_stream();
                waiting.waiter.was_sent.store(!needs_stream, SeqCst);
                let deadline = waiting.deadline;
                drop(traffic);
                let answer = match needs_stream {
                    true => self.send_one(&request.as_greeting(), deadline),
                    false => self.send_one(&request, deadline),
                };
                traffic = lock(&self.traffic);
                if needs_stream && traffic.takes_streams {
                    traffic.queue.push_front((number, request));
                    continue;
                }
                let waiting = traffic.waiters.remove(&number);
                drop(traffic);
                if let Some(waiting) = waiting
                    && let Some(answer) = answer.filter(|_| !needs_stream)
                {
                    waiting.deliver(answer);
                }
                traffic = lock(&self.traffic);
            }
            traffic.threads -= 1;
            if !traffic.queue.is_empty() {
                self.dispatch(traffic);
            }
        }

        /// Sends a request as plain HTTP and waits for its answer. Learns from it whether the peer takes streams.
        fn send_one(&self, request: &Request, deadline: Instant) -> Option<Answer> {
            let began = Instant::now();
            let limit = deadline.saturating_duration_since(began).min(ANSWER_LIMIT);
            // After a panic there is no answer.
            let sent = catch_unwind(AssertUnwindSafe(|| {
                let host = self.host().ok_or(io::Error::from(HostUnreachable))?;
                request.send(&host, limit)
            }));
            match sent.ok()? {
                Ok((answer, takes_streams)) => {
                    lock(&self.traffic).takes_streams |= takes_streams;
                    Some(answer)
                }
                Err(error) => {
                    self.forget_addresses();
                    // If there is no way to the peer at all, whatever else waits for it is told so as well.
                    if is_no_way(&error) && began.elapsed() < limit {
                        lock(&self.traffic).give_up_queue();
                    }
                    None
                }
            }
        }

        // -- Where a peer is

        /// The peer's `host:port` with the name looked up, which the client would do for each request. A name that stands for
        /// several addresses is left to it, since it tries them side by side.
        fn host(&self) -> Option<String> {
            match &self.addresses()[..] {
                [] => None,
                [one] => Some(one.to_string()),
                _ => Some(self.address.clone()),
            }
        }

        fn addresses(&self) -> Vec<SocketAddr> {
            let asked = Instant::now();
            let mut lookup = lock(&self.lookup);
            // What another thread learned while this one waited for it is as good, also that there is no such name.
            let is_fresh = |(at, addresses): &(Instant, Vec<SocketAddr>)| {
                *at >= asked || !addresses.is_empty() && at.elapsed() < LOOKUP_LIFETIME
            };
            match &*lookup {
                Some(known) if is_fresh(known) => known.1.clone(),
                _ => {
                    let addresses = look_up(&self.address);
                    *lookup = Some((Instant::now(), addresses.clone()));
                    addresses
                }
            }
        }

        /// Has the name looked up again before the next connection: a container that is started again may have another address.
        fn forget_addresses(&self) {
            // Who holds this is looking it up.
            if let Ok(mut lookup) = self.lookup.try_lock() {
                *lookup = None;
            }
        }

        // -- The watch

        /// Ends waiting that is in vain, has a peer looked for that is silent, and ends a stream that nobody needs.
        fn look_after(self: &Arc<Peer>, now: Instant) {
            let mut traffic = lock(&self.traffic);
            let Traffic { waiters, queue, .. } = &mut *traffic;
            let late = waiters.extract_if(|_, waiting| waiting.deadline < now).map(|(_, waiting)| waiting);
            let late: Vec<Waiting> = late.collect();
            if !late.is_empty() {
                self.forget_addresses();
            }
            give_up(late);
            queue.retain(|(number, _)| waiters.contains_key(number));
            let State::Open(stream) = &traffic.stream else { return };
            if traffic.waiters.is_empty() && is_past(traffic.asked, REST) {
                traffic.close();
            } else if is_past(traffic.heard.max(traffic.looked), SILENCE) {
                let (peer, stream) = (self.clone(), stream.clone());
                traffic.looked = Some(now);
                let _ = thread::Builder::new().spawn(move || peer.look_for(stream));
            }
        }
    }

    /// The watch over the peers. To be repeated by a thread of its own.
    pub fn watch_peers() {
        let mut peers = lock(&PEERS);
        // (Any client can name a thousand nodes in a view.) A follower has one peer, and remembers what it takes.
        peers.retain(|_, peer| Arc::strong_count(peer) > 1 || own().is_none());
        let known: Vec<Arc<Peer>> = peers.values().cloned().collect();
        drop(peers);
        let now = Instant::now();
        known.iter().for_each(|peer| peer.look_after(now));
    }

    // -- The client

    /// What a name stands for; nothing if that is not known in time. A name server that does not answer holds a lookup for ten
    /// seconds, so it has a thread of its own, which ends when it ends.
    fn look_up(address: &str) -> Vec<SocketAddr> {
        let (address, (tell, told)) = (address.to_owned(), mpsc::channel());
        let look_up = move || tell.send(address.to_socket_addrs().map_or(Vec::new(), Iterator::collect));
        let _ = thread::Builder::new().spawn(look_up);
        told.recv_timeout(LOOK_LIMIT).unwrap_or_default()
    }

    fn is_no_way(error: &attohttpc::Error) -> bool {
        matches!(error.kind(), ErrorKind::Io(error) if NO_WAY.contains(&error.kind()))
    }

    /// A request of the client, without what it would do by itself: it reads `http_proxy`, and follows redirects. The limit is for
    /// all of it until the whole answer is there, however slowly that drips.
    fn client(verb: &str, url: &str, limit: Duration) -> attohttpc::Result<RequestBuilder> {
        let method = Method::from_bytes(verb.as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let builder = RequestBuilder::try_new(method, url)?.proxy_settings(ProxySettings::builder().build());
        Ok(builder.follow_redirects(false).connect_timeout(CONNECT_LIMIT).read_timeout(limit).timeout(limit))
    }

    impl Request {
        /// About how many bytes it takes in a message.
        fn size(&self) -> usize {
            self.body.len() + self.target.len() + self.via.len() + self.content_type.len() + 64
        }

        /// The target on a host. What of it the client would change is for `needs_stream` to tell.
        fn url(&self, host: &str) -> String {
            format!("http://{host}{}", self.target)
        }

        /// Whether plain HTTP cannot carry this: the client takes the segments `.` and `..`, which may be keys, out of a target,
        /// and makes something of its own of CONNECT.
        fn needs_stream(&self) -> bool {
            let url = self.url("peer");
            let same =
                |sent: Url| percent_decode(sent[..Part::AfterQuery].as_bytes()).eq(percent_decode(url.as_bytes()));
            // A target that is no path would go on with the host: `@another:80/`.
            let is_path = self.target.starts_with('/') && self.verb != "CONNECT";
            self.origin != Origin::Client || !is_path || !Url::parse(&url).is_ok_and(same)
        }

        /// What can be asked instead, to learn whether the peer takes streams.
        fn as_greeting(&self) -> Request {
            Request { verb: "GET".into(), target: "/kv-store".into(), via: self.via.clone(), ..Request::default() }
        }

        /// Sends the request to a host and reads the answer, of which status, `Content-Type`, `Allow` and body go on; and
        /// whether the host takes streams.
        pub fn send(&self, host: &str, limit: Duration) -> attohttpc::Result<(Answer, bool)> {
            let mut builder = client(&self.verb, &self.url(host), limit)?;
            if !self.via.is_empty() {
                builder = builder.try_header("Via", &self.via)?;
            }
            if !self.content_type.is_empty() {
                builder = builder.try_header("Content-Type", &self.content_type)?;
            }
            let (status, headers, reader) = builder.bytes(&self.body).send()?.split();
            let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
            let mut body = Vec::new();
            let length = reader.take(MAX_ANSWER).read_to_end(&mut body)?;
            let is_cut = value("Content-Length").is_some_and(|expected| expected.parse() != Ok(length));
            if is_cut || length as u64 == MAX_ANSWER {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let content_type = value("Content-Type").unwrap_or("application/octet-stream");
            let allow = value("Allow").map_or(String::new(), |verbs| format!("\r\nAllow: {verbs}"));
            let header = format!("Content-Type: {content_type}{allow}").into();
            let takes_streams = value("Accept-Post") == Some(STREAM);
            Ok((Answer { status: status.as_u16(), header, body }, takes_streams))
        }
    }
}

// ---- The end of a stream that is asked ------------------------------------------------------------------------------

mod answering {
    //! A coroutine reads what is asked. What can be answered at once is answered there; what takes its time has a coroutine of its
    //! own, and its answer comes when it comes.

    use super::*;

    /// How many requests of all streams may take their time side by side, since each has a stack. What is more holds its stream up.
    const MAX_WORK: u32 = 2000;
    static WORK: AtomicU32 = AtomicU32::new(0);
    /// How many bytes of questions a stream may bring before others have their turn.
    const QUESTIONS: u64 = 64 << 10;

    struct Asked {
        socket: Arc<TcpStream>,
        /// The connection that became the stream: with what is unread of it, the watch deals as with that of others.
        client: &'static Client,
        /// None when the stream has ended.
        outbox: Mutex<Option<Outbox>>,
    }

    impl Asked {
        /// Does something with the outbox. None if the stream has ended.
        fn with<T>(&self, work: impl FnOnce(&mut Outbox) -> T) -> Option<T> {
            let mut outbox = lock(&self.outbox);
            let result = work(outbox.as_mut()?);
            self.client.set_unread(outbox.as_ref()?.length());
            Some(result)
        }

        fn push(&self, number: u64, answer: &Answer) {
            let length = self.with(|outbox| {
                outbox.push(number, answer, answer.size());
                outbox.length()
            });
            // Much that takes its time may have been asked while there was room.
            if length > Some(MAX_UNSENT) && is_memory_full() {
                self.end();
            }
        }

        /// Sees to it that what is in the outbox is written.
        fn flush(self: &Arc<Asked>) {
            if self.with(Outbox::claim) == Some(true) {
                let (stream, broken) = (self.clone(), self.clone());
                write_from(self.socket.clone(), move |_| stream.with(Outbox::next)?, move |_| broken.end());
            }
        }

        /// Waits for room for another answer. (Whose answers all leave has some, however crowded it is.) False if the stream ends
        /// first.
        fn wait_for_room(self: &Arc<Asked>) -> bool {
            let has_room = |outbox: &mut Outbox| match outbox.length() {
                0 => true,
                length => length < MAX_UNSENT && UNREAD.load(SeqCst) < MAX_UNREAD,
            };
            while self.with(has_room) == Some(false) {
                self.flush();
                // Another coroutine may be writing.
                if self.with(has_room) == Some(false) {
                    pause(Duration::from_millis(1));
                }
            }
            self.with(has_room).is_some()
        }

        /// Gives signs of life until the stream has ended. (It holds none while it sleeps, so that the descriptor can close.)
        fn give_signs_of_life(stream: Weak<Asked>) {
            while let Some(stream) = stream.upgrade().filter(|stream| stream.with(Outbox::give_sign_of_life).is_some())
            {
                stream.flush();
                drop(stream);
                pause(SIGN_OF_LIFE);
            }
        }

        fn end(&self) {
            if let Some(outbox) = lock(&self.outbox).take() {
                self.client.set_unread(0);
                FREED.fetch_add(outbox.length(), SeqCst);
            }
            let _ = self.socket.shutdown(Shutdown::Both);
        }

        /// Answers what is asked, now or later. Only from who knows the store's secret is it taken for what a node says.
        fn answer(self: &Arc<Asked>, number: u64, request: Request, knows_secret: bool) {
            if request.origin != Origin::Client && !knows_secret {
                return self.push(number, &Outcome::NotOfStore.answer(Vocabulary::Form, "POST"));
            }
            // A panic must not leave whoever asked without an answer.
            let in_vain = |_| Outcome::MainDown.answer(Vocabulary::Form, "GET");
            let work = match catch_unwind(|| answer_or_defer(request)) {
                Ok(Ok(answer)) => return self.push(number, &answer),
                Ok(Err(work)) => work,
                Err(panic) => return self.push(number, &in_vain(panic)),
            };
            let stream = Arc::downgrade(self);
            let work = move || {
                let answer = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(in_vain);
                WORK.fetch_sub(1, SeqCst);
                if let Some(stream) = stream.upgrade() {
                    stream.push(number, &answer);
                    stream.flush();
                } else {
                    FREED.fetch_add(answer.size() as u64, SeqCst);
                }
            };
            if WORK.fetch_add(1, SeqCst) < MAX_WORK {
                may::go!(work);
            } else {
                self.flush();
                work();
            }
        }
    }

    /// Answers what is asked on a stream, until it ends. `knows_secret` is whether who opened it has proven that.
    pub fn answer_stream(
        id: &str,
        mut body: BodyReader,
        socket: &TcpStream,
        client: &'static Client,
        knows_secret: bool,
    ) {
        // (On the descriptor of the connection itself, answers would leave in place of what is written: see `send`.)
        let Ok(socket) = socket.try_clone() else { return drop(socket.shutdown(Shutdown::Both)) };
        let stream = Arc::new(Asked { socket: Arc::new(socket), client, outbox: Mutex::new(Some(Outbox::default())) });
        // Nothing is proven to whoever proves nothing.
        let proof = proof(id, &format!("{ANSWERS} {}", own().unwrap_or_default())).filter(|_| knows_secret);
        let proof = proof.map_or(String::new(), |proof| format!("Authentication-Info: {proof}\r\n"));
        // Without a length, the body ends with the connection (RFC 9112 section 6.3).
        let head = format!("HTTP/1.1 200 OK\r\nServer: M\r\nContent-Type: {STREAM}\r\n{proof}{CLOSE}\r\n");
        let mut was_asked = false;
        if write_now(&stream.socket, head.as_bytes()).is_ok_and(|count| count == head.len()) {
            read_from(&stream.socket, &mut body, QUESTIONS, |questions| {
                for (number, request) in questions {
                    // For who does not read answers, no more are made.
                    if stream.wait_for_room() {
                        stream.answer(number, request, knows_secret);
                    }
                }
                stream.flush();
                if !std::mem::replace(&mut was_asked, true) {
                    let stream = Arc::downgrade(&stream);
                    may::go!(move || Asked::give_signs_of_life(stream));
                }
            });
        }
        // Otherwise the server would read the body to its end, which never comes.
        stream.end();
    }

    /// Whether who opens a stream proves (in the form of RFC 6750 section 2.1) that it knows what the nodes of this store share. An
    /// error is a proof that is none.
    pub fn knows_secret(parsed: &Parsed, id: &str) -> Result<bool, Outcome> {
        let mut headers = parsed.headers().iter();
        let given = headers.find(|header| header.name.eq_ignore_ascii_case("Authorization"));
        let given = given.map(|header| header.value.strip_prefix(b"Bearer ").unwrap_or_default());
        match is_proven(given.unwrap_or_default(), id, &format!("{REQUESTS} {}", own().unwrap_or_default())) {
            false if given.is_some() => Err(Outcome::NotOfStore),
            knows => Ok(knows),
        }
    }
}

// ---- Connections: where the bytes come from and go to ---------------------------------------------------------------
//
// may_minihttp parses requests, and sends answers when it has dealt with all that it read. Much it cannot do: answer what it refused
// to parse, answer without a body (HEAD) or with headers that are not known when it is compiled, answer before the next request's
// body has come, close, and wait for a client that does not read. So a connection writes its answers itself, into its `Output`. The
// server has an empty answer for each, and when it sends these, the output is sent in their place (`send`, in the next section): as
// long as there is output, the server has something to send, and goes on trying.
//
// A connection is closed
// - after the answer to `Connection: close` and HTTP/1.0 (`close_with`);
// - after a refusal, since where the next request begins is not known, or not worth reading up to it (`refuse`);
// - without an answer, when a body ends before its length, or the stream that it carries ends (`end`);
// - by the watch, when nothing happened on it for long, or too many answers are unread (`watch_connections`);
// - at once, when there are too many (`new_service`).

/// One client connection: the server's service.
struct Connection {
    socket: Socket,
    client: &'static Client,
    /// How many bytes of answers were made since other connections had their turn.
    served: u64,
    /// The client may still be sending when the connection is closed.
    lingers: bool,
    /// The last request came by way of another instance.
    relayed: bool,
}

/// How far a client's connection has got: what the connection, the watch, and `recv` and `send` know of it together.
struct Client {
    /// The descriptor is that of a client's connection.
    is_open: AtomicBool,
    /// Goes up when a request begins to be dealt with and when that ends: it is odd meanwhile, and when the connection is over.
    calls: AtomicU32,
    /// The whole request is there, and its answer is not yet: that may take as long as a view change.
    answering: AtomicBool,
    /// None is an empty one. (A table of these is all zeros, and so no part of the binary.)
    output: Mutex<Option<Box<Output>>>,
    /// How many bytes of answers the kernel has not taken yet (on a stream, a write counts until all of it is taken).
    unread: AtomicU64,
    /// How many bytes were read since a request was last dealt with. Where they are many, they are a head that does not end.
    head: AtomicU64,
    /// The last `recv` brought bytes.
    has_read: AtomicBool,
    /// A body was read from the socket, and did not come with its head.
    read_body: AtomicBool,
    /// The server was told that the client sends nothing more.
    has_left: AtomicBool,
    /// Nothing more is answered or sent, also since the client does not read. What the server still reads is not looked at.
    has_ended: AtomicBool,
}

/// The answers of a connection, until all of them are sent.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    /// How many of these the kernel has taken.
    taken: usize,
}

/// The clients, by the descriptors of their sockets. (There are never as many: see MAX_CONNECTIONS.)
static CLIENTS: [Client; 1 << 17] = [const { Client::new() }; 1 << 17];

/// Lets others have their turn, if more than `most` bytes were dealt with since they last had. To yield would not do: the worker polls
/// only when no coroutine is ready, and of two clients that send without end one always is. But the poll signals a socket that it was
/// just told of, so whoever waits for that comes after all others.
fn take_turn(socket: &TcpStream, served: &mut u64, most: u64) {
    if *served > most {
        *served = 0;
        if let Ok(stream) = waiting_stream(socket, None) {
            stream.wait_io();
        }
    }
}

/// What is unread of all connections.
static UNREAD: AtomicU64 = AtomicU64::new(0);

/// Whether there is no room for another large answer.
fn is_memory_full() -> bool {
    UNREAD.load(SeqCst) > MAX_UNREAD_EVER
}

impl Client {
    const fn new() -> Client {
        Client {
            is_open: AtomicBool::new(false),
            calls: AtomicU32::new(0),
            answering: AtomicBool::new(false),
            output: Mutex::new(None),
            unread: AtomicU64::new(0),
            head: AtomicU64::new(0),
            has_read: AtomicBool::new(false),
            read_body: AtomicBool::new(false),
            has_left: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
        }
    }

    /// The client whose socket has this descriptor. None if it is something else's.
    fn at(fd: RawFd) -> Option<&'static Client> {
        CLIENTS.get(fd as usize).filter(|client| client.is_open.load(Relaxed))
    }

    /// Begins anew: the descriptor is that of another connection now.
    fn open(&self) {
        self.calls.store(0, SeqCst);
        self.head.store(0, SeqCst);
        self.unread.store(0, SeqCst);
        for flag in [&self.answering, &self.has_read, &self.read_body, &self.has_left, &self.has_ended] {
            flag.store(false, SeqCst);
        }
        self.is_open.store(true, SeqCst);
    }

    /// The descriptor is nobody's now.
    fn close(&self) {
        self.is_open.store(false, SeqCst);
        self.forget(self.take_output(), 0);
    }

    /// Adds to the output.
    fn write(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut output = lock(&self.output);
        let bytes = &mut output.get_or_insert_default().bytes;
        let before = bytes.len();
        write(bytes);
        let count = (bytes.len() - before) as u64;
        self.unread.fetch_add(count, SeqCst);
        UNREAD.fetch_add(count, SeqCst);
    }

    /// So many bytes of answers are not sent yet.
    fn set_unread(&self, count: u64) {
        let before = self.unread.swap(count, SeqCst);
        UNREAD.fetch_add(count.wrapping_sub(before), SeqCst);
    }

    /// So many bytes of answers are sent, or never will be.
    fn has_less(&self, count: u64) {
        self.unread.fetch_sub(count, SeqCst);
        UNREAD.fetch_sub(count, SeqCst);
    }

    fn unread(&self) -> u64 {
        self.unread.load(SeqCst)
    }

    fn has_output(&self) -> bool {
        lock(&self.output).as_ref().is_some_and(|output| !output.bytes.is_empty())
    }

    /// Whether it is time to send what there is: it is much, or the kernel had no room for all of it when it was last sent.
    fn has_batch(&self) -> bool {
        lock(&self.output).as_ref().is_some_and(|output| output.taken > 0 || output.bytes.len() > BATCH)
    }

    /// Takes the output away, and returns what of it is not sent, which still counts as unread.
    fn take_output(&self) -> Vec<u8> {
        let Output { mut bytes, taken } = *lock(&self.output).take().unwrap_or_default();
        bytes.drain(..taken);
        // Its client may take long to read it.
        bytes.shrink_to_fit();
        bytes
    }

    /// Drops bytes that were taken out of the output, of which so many were sent since. (Memory counts as free when it is: it is
    /// given back then.)
    fn forget(&self, bytes: Vec<u8>, sent: usize) {
        self.has_less((bytes.len() - sent) as u64);
        let capacity = bytes.capacity();
        drop(bytes);
        FREED.fetch_add(capacity as u64, SeqCst);
    }

    /// Gives the output to the kernel, as much as that takes now. True if it took all.
    fn send_output(&self, fd: RawFd, flags: libc::c_int) -> io::Result<bool> {
        let mut output = lock(&self.output);
        let Some(Output { bytes, taken }) = output.as_deref_mut() else { return Ok(true) };
        while *taken < bytes.len() {
            let rest = &bytes[*taken..];
            // SAFETY: sendto reads the bytes, which outlive the call.
            let count = unsafe { libc::sendto(fd, rest.as_ptr().cast(), rest.len(), flags, std::ptr::null(), 0) };
            if count < 0 {
                let error = io::Error::last_os_error();
                return if error.kind() == io::ErrorKind::WouldBlock { Ok(false) } else { Err(error) };
            }
            *taken += count as usize;
            self.has_less(count as u64);
        }
        if bytes.capacity() > 2 * BATCH {
            FREED.fetch_add(bytes.capacity() as u64, SeqCst);
            *bytes = Vec::new();
        }
        bytes.clear();
        *taken = 0;
        Ok(true)
    }
}

/// The answer to a PUT or POST whose body is too large to be read.
fn refusal_of_oversized(request: Request) -> Answer {
    let (Resource::Key(key), vocabulary) = request.route() else { return answer_about(request) };
    match Action::of(&key, &request, vocabulary) {
        Action::Refuse(outcome) => outcome.answer(vocabulary, &request.verb),
        _ => Outcome::BadRequest.answer(vocabulary, &request.verb),
    }
}

struct Server;

impl HttpServiceFactory for Server {
    type Service = Connection;

    /// Called once for each connection. `id` is the descriptor of its socket, open until after the service is dropped.
    fn new_service(&self, id: usize) -> Connection {
        let (socket, client) = (borrow_socket(id as RawFd), &CLIENTS[id % CLIENTS.len()]);
        client.open();
        // Without this, an answer that leaves in two writes waits 40 ms for the client's delayed acknowledgement.
        let _ = socket.set_nodelay(true);
        let mut connections = lock(&CONNECTIONS);
        // The accept loop would spin without end if descriptors ran out: the last ones are never used.
        let crowded = connections.len() as u64 >= *MAX_CONNECTIONS;
        if crowded {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let now = Instant::now();
        connections.insert(id as RawFd, Watched { client, seen: 0, since: now, acknowledged: 0, stuck: None });
        drop(connections);
        client.has_ended.store(crowded, SeqCst);
        Connection { socket, client, served: 0, lingers: false, relayed: false }
    }
}

impl HttpService for Connection {
    fn call(&mut self, parsed: Parsed, _: &mut Response) -> io::Result<()> {
        if !self.client.has_ended.load(SeqCst) {
            self.client.calls.fetch_add(1, SeqCst);
            self.serve(parsed);
            self.client.head.store(0, SeqCst);
            self.client.calls.fetch_add(1, SeqCst);
        }
        Ok(())
    }
}

impl Connection {
    fn serve(&mut self, parsed: Parsed) {
        let (mut request, framing) = match read_head(&parsed) {
            Ok(head) => head,
            Err(refusal) => return self.refuse(refusal.answer(Vocabulary::Form, "GET"), parsed.method() == "HEAD"),
        };
        self.relayed = !request.via.is_empty();
        if request.is_stream() {
            return self.serve_stream(&request, parsed);
        } else if request.oversized {
            return self.refuse(refusal_of_oversized(request), false);
        }
        if framing.expects_continue {
            self.send_continue();
        }
        if framing.length > 0 {
            let body = request.wants_body(framing.length).then_some(&mut request.body);
            if !self.read_body(parsed.body(), framing.length, body) {
                // What it sent before is answered.
                self.flush();
                return self.end();
            }
        }
        if request.verb == "GET" && !self.wait_for_room() {
            return self.end();
        }
        let verb = VERBS.into_iter().find(|verb| *verb == request.verb).unwrap_or_default();
        let answer = self.answer(request);
        if answer.body.len() > BATCH && is_memory_full() {
            // There was room when another instance was asked for this (`wait_for_room`).
            drop(answer);
            self.flush();
            return self.end();
        }
        count_answer(verb, answer.status);
        if framing.closing {
            self.close_with(answer, framing.is_head);
        } else {
            self.respond(answer, framing.is_head);
        }
    }

    /// Has a whole request answered, however long that takes.
    fn answer(&mut self, request: Request) -> Answer {
        self.client.answering.store(true, SeqCst);
        self.served += request.body.len() as u64;
        let answer = answer_or_defer(request).unwrap_or_else(|work| {
            // That may take long, and what was asked before is answered.
            self.flush();
            work()
        });
        self.client.answering.store(false, SeqCst);
        answer
    }

    /// Answers a request on a connection that stays open: at once, or with what follows.
    fn respond(&mut self, answer: Answer, without_body: bool) {
        self.served += answer.size() as u64;
        self.client.write(|out| answer.write(out, "", without_body));
        drop(answer);
        if self.client.has_batch() {
            self.flush();
        }
        take_turn(&self.socket, &mut self.served, TURN);
    }

    /// Becomes a stream, as long as that lives.
    fn serve_stream(&mut self, request: &Request, parsed: Parsed) {
        let id = request.target.strip_prefix("/kv-store?stream=").unwrap_or_default();
        let knows_secret = match answering::knows_secret(&parsed, id) {
            Ok(knows) => knows,
            Err(refusal) => return self.refuse(refusal.answer(Vocabulary::Form, "POST"), false),
        };
        // It writes on the socket, and would overtake the answers to what came before it.
        if id.is_empty() || self.client.calls.load(SeqCst) > 1 {
            return self.refuse(Outcome::BadRequest.answer(Vocabulary::Form, "POST"), false);
        }
        answering::answer_stream(id, parsed.body(), &self.socket, self.client, knows_secret);
        self.end();
    }

    /// Reads a whole body, to keep it or not. False is a client that left before it was complete: its request never happened.
    fn read_body(&self, mut reader: BodyReader, length: usize, mut body: Option<&mut Vec<u8>>) -> bool {
        let (mut taken, mut served) = (0, 0);
        while !self.client.has_ended.load(SeqCst) {
            let arrived = match reader.fill_buf() {
                Ok([]) => break,
                Ok(arrived) => arrived,
                // (`after_read`)
                Err(error) if error.raw_os_error() == Some(SEND_FIRST) => {
                    self.flush();
                    continue;
                }
                Err(_) => break,
            };
            let count = arrived.len();
            if let Some(body) = &mut body {
                body.extend(arrived);
            }
            reader.consume(count);
            taken += count;
            served += count as u64;
            take_turn(&self.socket, &mut served, BODY_TURN);
        }
        if self.client.read_body.swap(false, Relaxed) {
            signal_again(&self.socket);
        }
        taken == length
    }

    /// Waits while too much is unread by all clients together, before more is made: those that read nothing are soon closed.
    /// False if this connection is one of them.
    fn wait_for_room(&self) -> bool {
        let is_crowded = || UNREAD.load(SeqCst) > MAX_UNREAD;
        let has_ended = || self.client.has_ended.load(SeqCst);
        if is_crowded() {
            // Nothing is sent on this connection meanwhile.
            self.flush();
        }
        // Longer than it takes to close those that read nothing.
        let until = Instant::now() + 2 * STUCK;
        while is_crowded() && !has_ended() && Instant::now() < until {
            pause(Duration::from_millis(5));
        }
        !has_ended()
    }

    /// Tells a client that asked first that it may send its body (RFC 9110 section 10.1.1).
    fn send_continue(&self) {
        self.client.write(|out| out.extend(b"HTTP/1.1 100 Continue\r\n\r\n"));
        self.flush();
    }

    /// Sends the output, however long the client takes to read it: the watch ends what takes too long.
    /// A connection that breaks ends.
    fn flush(&self) {
        match self.client.send_output(self.socket.as_raw_fd(), libc::MSG_NOSIGNAL) {
            Ok(true) => {}
            Ok(false) => self.wait_and_send(self.client.take_output()),
            Err(_) => self.end(),
        }
    }

    /// Sends bytes that were taken out of the output, and makes the coroutine wait for the client to read.
    fn wait_and_send(&self, bytes: Vec<u8>) {
        let mut sent = 0;
        // The kernel asks for more only when a third of its buffer is free, which may take a slow reader minutes.
        if let Ok(mut stream) = waiting_stream(&self.socket, None) {
            while let Ok(count @ 1..) = stream.write(&bytes[sent..]) {
                self.client.has_less(count as u64);
                sent += count;
            }
        }
        if sent < bytes.len() {
            self.end();
        }
        self.client.forget(bytes, sent);
    }

    /// Answers a request whose end is not known or not worth reading up to it.
    fn refuse(&mut self, answer: Answer, without_body: bool) {
        count_answer("other", answer.status);
        self.close_with(answer, without_body);
    }

    /// Sends a last answer and closes the connection.
    fn close_with(&mut self, answer: Answer, without_body: bool) {
        // A follower that does not know this instance yet asks one thing a connection: this reaches it (W3C, Linked Data
        // Platform, section 7.1).
        let accepts = if self.relayed { format!("Accept-Post: {STREAM}\r\n") } else { String::new() };
        self.client.write(|out| answer.write(out, &format!("{CLOSE}{accepts}"), without_body));
        // The last packet is held back until the stream ends, so that a client that has the whole answer has its end as well. So this
        // side, and not a relaying one, is the first to close and has its port in TIME_WAIT (RFC 9293 section 3.6.1): 28,000
        // relays in a minute would use up the other side's ports.
        let _ = self.client.send_output(self.socket.as_raw_fd(), libc::MSG_MORE | libc::MSG_NOSIGNAL);
        self.flush();
        self.lingers = true;
        self.end();
    }

    /// Lets nothing more out: the server's next write fails, and then it closes the connection.
    fn end(&self) {
        self.client.has_ended.store(true, SeqCst);
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// The server is done with the connection: the client left, or sent something that is not HTTP or has too many headers. To
/// that, the server says nothing; this does, after the answers that are still to be sent.
impl Drop for Connection {
    fn drop(&mut self) {
        // As in a call, nothing that comes is a head any more.
        let had_call = self.client.calls.fetch_or(1, SeqCst) > 0;
        let head = self.client.head.load(SeqCst);
        let state = info(&self.socket).map_or(0, |info| info.tcpi_state);
        let has_left = self.client.has_left.load(SeqCst);
        if self.client.has_ended.load(SeqCst) || thread::panicking() || ![ESTABLISHED, CLOSE_WAIT].contains(&state) {
            // Nothing can be sent any more.
        } else if head > MAX_READ || has_left && head > 0 && !had_call {
            // A head that does not end, or ended with the stream. (After a request, a line's end may follow that is nothing.)
            self.refuse(Outcome::BadRequest.answer(Vocabulary::Form, "GET"), false);
        } else if !has_left {
            self.refuse(Outcome::Unparsed.answer(Vocabulary::Form, "GET"), false);
        } else {
            // The client sends nothing more, but may still be reading.
            self.flush();
        }
        // Closing a socket with unread input resets the connection, and the reset may reach the client before it has read its
        // answer: what it still sends is read and forgotten.
        if self.lingers
            && let Ok(mut stream) = waiting_stream(&self.socket, Some(Duration::from_secs(1)))
        {
            let (deadline, mut buffer, mut served) = (Instant::now() + Duration::from_secs(5), vec![0; BATCH], 0);
            while Instant::now() < deadline
                && let Ok(count @ 1..) = stream.read(&mut buffer)
            {
                served += count as u64;
                take_turn(&self.socket, &mut served, BODY_TURN);
            }
        }
        lock(&CONNECTIONS).remove(&self.socket.as_raw_fd());
        self.client.close();
        // The buffers and the stack.
        FREED.fetch_add(80 << 10, SeqCst);
    }
}

/// What the watch remembers of a connection.
struct Watched {
    client: &'static Client,
    /// The count of calls when last seen, and since when it is the same.
    seen: u32,
    since: Instant,
    /// How many bytes of answers the client had confirmed at the last look.
    acknowledged: u64,
    /// Since when the client was seen to have answers to read and to read nothing.
    stuck: Option<Instant>,
}

static CONNECTIONS: LazyLock<Mutex<HashMap<RawFd, Watched>>> = LazyLock::new(Default::default);
/// A third of the files that the system lets this process open, less some for everything else: a stream that is read slowly takes
/// three (`answer_stream`, `waiting_stream`). And less than half the mappings that Linux lets a process have: a coroutine's stack
/// takes two, and without one the server ends.
static MAX_CONNECTIONS: LazyLock<u64> = LazyLock::new(|| {
    let files = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
    (files.saturating_sub(OTHER_FILES) / 3).min(28_000)
});
/// The files that are left for all but connections.
const OTHER_FILES: u64 = 200;
/// With room for fewer connections the program does not start.
const MIN_CONNECTIONS: u64 = 100;

/// Ends connections on which nothing happens for too long, and those that take too much room. To be repeated by a thread of its own.
fn watch_connections() {
    let mut connections = lock(&CONNECTIONS);
    connections.iter_mut().for_each(|(fd, watched)| watched.look(borrow_socket(*fd)));
    close_greediest(&connections);
}

/// What connections and records that are gone had of memory, in bytes, by estimate: the allocator keeps it.
static FREED: AtomicU64 = AtomicU64::new(0);

/// Gives memory back to the system when there is some and no more is being freed, or when there is very much. (To give it back holds
/// up whoever allocates.) To be done once a second.
fn give_back_memory() {
    let freed = Live.with(|node| node.records.take_freed()) as u64;
    let total = FREED.fetch_add(freed, SeqCst) + freed;
    static BEFORE: AtomicU64 = AtomicU64::new(0);
    let growth = total.saturating_sub(BEFORE.swap(total, SeqCst));
    if (total > 16 << 20 && growth < 1 << 20) || total > 256 << 20 {
        FREED.fetch_sub(total, SeqCst);
        BEFORE.store(0, SeqCst);
        // SAFETY: malloc_trim has no preconditions.
        unsafe { libc::malloc_trim(0) };
    }
}

/// Closes the connections with the most unread answers, while there are too many and their clients read nothing.
fn close_greediest(connections: &HashMap<RawFd, Watched>) {
    if UNREAD.load(SeqCst) < MAX_UNREAD {
        return;
    }
    let remaining = connections.iter().filter(|(_, watched)| !watched.client.has_ended.load(SeqCst));
    let mut total: u64 = remaining.clone().map(|(_, watched)| watched.client.unread()).sum();
    let stuck = remaining.filter(|(_, watched)| watched.stuck.is_some_and(|since| since.elapsed() > STUCK));
    let mut stuck: BinaryHeap<(u64, RawFd)> = stuck.map(|(fd, watched)| (watched.client.unread(), *fd)).collect();
    // Some room is made at once, for whoever waits for it.
    while total > MAX_UNREAD / 2
        && let Some((unread @ 1.., fd)) = stuck.pop()
    {
        total = total.saturating_sub(unread);
        connections[&fd].client.has_ended.store(true, SeqCst);
        let _ = borrow_socket(fd).shutdown(Shutdown::Both);
    }
}

impl Watched {
    /// Looks at a connection, and closes it if nothing happens on it for too long.
    fn look(&mut self, socket: Socket) {
        let (calls, unread, now) = (self.client.calls.load(SeqCst), self.client.unread(), Instant::now());
        let gets_on = self.seen != calls || self.client.answering.load(SeqCst);
        if gets_on {
            (self.seen, self.since) = (calls, now);
        }
        if gets_on || unread == 0 {
            self.stuck = None;
        }
        // What the kernel knows is worth a system call for a few only.
        let overdue = now - self.since > IDLE_LIMIT;
        if gets_on || unread == 0 && !overdue {
            return;
        }
        let Some(info) = info(&socket) else { return };
        if info.tcpi_bytes_acked != self.acknowledged {
            (self.acknowledged, self.stuck) = (info.tcpi_bytes_acked, None);
        } else if unread > 0 {
            self.stuck.get_or_insert(now);
        }
        let (limit, in_call) = (IDLE_LIMIT.as_millis() as u32, calls % 2 == 1);
        let sending = info.tcpi_notsent_bytes + info.tcpi_unacked > 0 && info.tcpi_last_ack_recv < limit;
        // (Who opened a stream may ask nothing for long, but confirms the signs of life.)
        let receiving = in_call && info.tcpi_last_data_recv.min(info.tcpi_last_ack_recv) < limit;
        // If a request began or ended meanwhile, what was learned says nothing.
        if overdue && !sending && !receiving && self.client.calls.load(SeqCst) == calls {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

// ---- The socket, behind the server's back ---------------------------------------------------------------------------

/// What the server reads of a client before a request's head is whole, in bytes, at most. It reads ahead by as much as it has, and
/// the limit of a head is exact only where the whole head is there.
const MAX_READ: u64 = 3 * MAX_HEAD as u64;

/// Takes the place of the C library's function of this name, with which the server, as the whole standard library, reads from sockets.
/// Without it, a request that comes together with the end of the stream is lost, since the server throws away what it has read then:
/// here the end comes one read later. And an endless head, of which the server collects hundreds of megabytes a second, ends here.
/// (A coroutine that has waited for input then reads with `read`, which is not seen here.)
// SAFETY: it has the type of the function of that name, and does what recv(2) says that may happen.
#[unsafe(no_mangle)]
unsafe extern "C" fn recv(fd: RawFd, buffer: *mut libc::c_void, size: usize, flags: libc::c_int) -> isize {
    // SAFETY: this is what recv is (recv(2)), and the caller answers for the rest.
    let count = unsafe { libc::recvfrom(fd, buffer, size, flags, std::ptr::null_mut(), std::ptr::null_mut()) };
    match Client::at(fd) {
        // (With flags, it is no read, but a look.)
        Some(client) if flags == 0 => client.after_read(fd, count),
        _ => count,
    }
}

/// Takes the place of the C library's function of this name, with which the server sends. What it sends is empty answers: these never
/// leave, and count as sent when the connection's output is.
// SAFETY: as `recv`.
#[unsafe(no_mangle)]
unsafe extern "C" fn send(fd: RawFd, buffer: *const libc::c_void, size: usize, flags: libc::c_int) -> isize {
    let Some(client) = Client::at(fd) else {
        LAST_SENT_ON.set(fd);
        // SAFETY: as in `recv`.
        return unsafe { libc::sendto(fd, buffer, size, flags, std::ptr::null(), 0) };
    };
    if client.has_ended.load(SeqCst) {
        return fail_with(libc::EPIPE);
    }
    match client.send_output(fd, flags) {
        Ok(true) => size as isize,
        Ok(false) => fail_with(libc::EAGAIN),
        Err(error) => fail_with(error.raw_os_error().unwrap_or(libc::EPIPE)),
    }
}

/// What a function of the C library returns when it fails.
fn fail_with(error: libc::c_int) -> isize {
    // SAFETY: errno is the thread's own.
    unsafe { *libc::__errno_location() = error };
    -1
}

impl Client {
    /// What the server is told of a read that brought so many bytes.
    fn after_read(&self, fd: RawFd, count: isize) -> isize {
        let in_call = self.calls.load(Relaxed) % 2 == 1;
        let had_read = self.has_read.load(Relaxed);
        if had_read != (count > 0) {
            self.has_read.store(count > 0, Relaxed);
        }
        if in_call {
            self.read_body.store(true, Relaxed);
        }
        let would_block = count < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock;
        if in_call && would_block && self.has_output() {
            return fail_with(SEND_FIRST);
        } else if count > 0 && !in_call {
            let head = self.head.fetch_add(count as u64, Relaxed) + count as u64;
            return if head > MAX_READ { fail_with(libc::ECONNABORTED) } else { count };
        } else if count == 0 && had_read && !in_call {
            // The server waits for a signal then, and the kernel has given this one already.
            signal_again(&borrow_socket(fd));
            return fail_with(libc::EAGAIN);
        } else if count == 0 {
            self.has_left.store(true, SeqCst);
        }
        count
    }
}

/// The error of a read that would wait for a body while there are answers to be sent: their client may wait for them. (Whoever waits
/// to read sends nothing.)
const SEND_FIRST: libc::c_int = libc::EBUSY;

/// A socket that somebody else owns and closes. It may be held only while its owner certainly keeps it open: by the service of a
/// connection, by `recv` in a call of the server, by the watch as long as the list of connections has it, and by `last_sent_on`
/// while attohttpc has its answer.
type Socket = ManuallyDrop<TcpStream>;

fn borrow_socket(fd: RawFd) -> Socket {
    // SAFETY: whoever may hold a Socket holds it while the descriptor is open; ManuallyDrop never closes it.
    ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) })
}

/// A socket as a stream that makes the coroutine wait, and not its worker: for `limit` at most, if there is one. While a panic ends
/// the coroutine there is none: it cannot wait any more.
fn waiting_stream(socket: &TcpStream, limit: Option<Duration>) -> io::Result<may::net::TcpStream> {
    if thread::panicking() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // SAFETY: the descriptor is a fresh one, and the stream becomes its only owner.
    let stream = unsafe { may::net::TcpStream::from_raw_fd(socket.try_clone()?.into_raw_fd()) };
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    Ok(stream)
}

/// Writes as many bytes as the kernel takes at once, and returns how many.
fn write_now(mut socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    match socket.write(bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        result => result,
    }
}

/// Writes on a stream between instances, and makes the coroutine wait for whoever is to read: not for ever.
fn write_waiting(socket: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    const WRITE_LIMIT: Duration = Duration::from_secs(10);
    waiting_stream(socket, Some(WRITE_LIMIT))?.write_all(bytes)
}

thread_local! {
    /// The descriptor on which this thread last sent something that was no answer to a client.
    static LAST_SENT_ON: Cell<RawFd> = const { Cell::new(-1) };
}

/// The socket on which attohttpc has just sent a request in this thread, for coroutines to go on with: it keeps its sockets to
/// itself, and would block a thread on each. To be called while it has the socket open.
fn last_sent_on() -> io::Result<TcpStream> {
    let socket = borrow_socket(LAST_SENT_ON.get()).try_clone()?;
    socket.set_nonblocking(true)?;
    // Without this, the next small write leaves when the last one is acknowledged, which may take 40 ms where nothing goes back.
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Has the kernel signal input once more, if there is any or the client has sent its end (setting SO_RCVLOWAT does). The server
/// waits for a signal that comes once an arrival; reading a body uses it up, and a request that came with the body's end would
/// be left lying.
fn signal_again(socket: &Socket) {
    let (one, size) = (&1 as *const libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: setsockopt reads an int, which outlives the call.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, one.cast(), size) };
}

/// The states of a connection in which something can be sent (RFC 9293 section 3.3.2, by Linux's numbers).
const ESTABLISHED: u8 = 1;
const CLOSE_WAIT: u8 = 8;

/// What the kernel knows of the connection (all of it since Linux 4.19).
fn info(socket: &TcpStream) -> Option<libc::tcp_info> {
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: a struct of integers may be zero, and getsockopt writes no more than `size` bytes.
    unsafe {
        let mut info: libc::tcp_info = std::mem::zeroed();
        let into = (&mut info as *mut libc::tcp_info).cast();
        let result = libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, into, &mut size);
        (result == 0).then_some(info)
    }
}

// ---- The start ------------------------------------------------------------------------------------------------------

fn main() {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|it| it.to_string_lossy().into_owned()).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => serve(&SETTINGS),
        ["--help" | "-h"] => drop(write!(io::stdout(), "{HELP}")),
        ["--version" | "-V"] => drop(writeln!(io::stdout(), "kv-store {VERSION}")),
        ["--health"] => exit(if is_healthy(SETTINGS.listen) { 0 } else { 1 }),
        _ => fail(2, &format!("{}: expected --help, --version, --health or nothing", arguments.join(" "))),
    }
}

/// How often a node meets others.
const MEETINGS: Duration = Duration::from_millis(250);

fn serve(Settings { listen, role, view, .. }: &'static Settings) {
    // As PID 1 of a container a process ignores these signals unless it says otherwise. There is nothing to save.
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 0, Arc::new(AtomicBool::new(true)));
    }
    let description = match role {
        Role::Main => "main instance".into(),
        Role::Follower(main) => format!("follower of {main}"),
        Role::Node(address) => format!("node {address} of {}", view.join(",")),
    };
    check_files();
    start_worker();
    // may shares a port with whoever else does (SO_REUSEPORT), and two stores would share the clients: ask without first.
    let server = TcpListener::bind(listen).map(drop).and_then(|()| Server.start(listen)).unwrap_or_else(|error| {
        let (ip, port) = (listen.ip(), listen.port());
        fail(1, &format!("IP={ip} PORT={port}: expected an address and port that can be listened on: {error}"))
    });
    say(&format!("{description}, version {VERSION}, listening on {listen}"));
    // Without /dev/null, stderr stays what it is.
    let _ = keep_stderr();
    // Its thread is started here, and not under the node's lock when there is something for it.
    LazyLock::force(&LEFTOVERS);
    repeat(STUCK / 4, watch_connections);
    repeat(Duration::from_secs(1), give_back_memory);
    repeat(Duration::ZERO, wake_sleepers);
    repeat(Duration::from_millis(100), relay::watch_peers);
    if let Role::Node(_) = role {
        repeat(MEETINGS, || keep_in_touch(&Live));
    }
    let _ = server.join();
    fail(1, &format!("IP={} PORT={}: expected to go on listening, but the server ended", listen.ip(), listen.port()))
}

/// Configures `may`: one worker thread, which runs all coroutines.
///
/// A coroutine that waits for a socket is stored where the thread that polls finds it, and `may` 0.3.51 goes on using the socket's data
/// after that (`subscribe` in its `io::sys::unix`). A second worker could run the coroutine to its end meanwhile, which frees the data:
/// the heap is corrupted, within seconds to minutes of mixed load (`./test.sh sanitize`). With one worker, the thread that would
/// run the coroutine is the one that is still in `subscribe`. This holds as long as nothing else runs coroutines, which `may`'s
/// timer thread does: no `may::coroutine::sleep`, and no parking with a time limit. (Time limits of sockets belong to the worker. The
/// timer thread does run one coroutine, with which may_minihttp keeps the time of day: it touches no socket and never ends.)
fn start_worker() {
    may::config().set_workers(1).set_stack_size(16 << 10).set_worker_pin(false);
    // An idle worker looks up once a second, and not a hundred times: whoever has something for it wakes it.
    may::config().set_timeout_ns(1_000_000_000);
}

/// Ends the program where the system lets it open too few files for a server.
fn check_files() {
    if *MAX_CONNECTIONS < MIN_CONNECTIONS {
        let (files, least) = (
            rlimit::getrlimit(rlimit::Resource::NOFILE).map_or(0, |(soft, _)| soft),
            OTHER_FILES + 3 * MIN_CONNECTIONS,
        );
        fail(1, &format!("ulimit -n {files}: expected {least} or more open files, for {MIN_CONNECTIONS} connections"))
    }
}

/// Has a thread of its own do something again and again.
fn repeat(pause: Duration, work: impl Fn() + Send + 'static) {
    thread::spawn(move || {
        loop {
            // What must go on for ever survives a panic, which the hook has printed.
            let _ = catch_unwind(AssertUnwindSafe(&work));
            thread::sleep(pause);
        }
    });
}

/// What stderr was when the instance began to serve.
static STDERR: OnceLock<File> = OnceLock::new();

/// Writes a line to stderr. The program goes on if it cannot, where eprintln! would not.
fn say(line: &str) {
    let line = format!("kv-store: {}\n", line.replace('\n', "\\n"));
    let _ = match STDERR.get() {
        Some(mut stderr) => stderr.write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

/// Takes stderr away from the server, which writes a line there for each malformed request; and has what this program writes
/// there get lost where nobody reads it, or both would stand still. (To open it anew makes only our own writes give up.)
fn keep_stderr() -> io::Result<()> {
    let nowhere = File::options().write(true).open("/dev/null")?;
    let anew = File::options().append(true).custom_flags(libc::O_NONBLOCK).open("/proc/self/fd/2");
    let stderr = anew.or_else(|_| io::stderr().as_fd().try_clone_to_owned().map(File::from))?;
    STDERR.get_or_init(|| stderr);
    // SAFETY: both descriptors are open.
    unsafe { libc::dup2(nowhere.as_raw_fd(), libc::STDERR_FILENO) };
    std::panic::set_hook(Box::new(|panic| say(&panic.to_string())));
    Ok(())
}

/// Takes the place of the C library's function, which tells the bounds of a thread's stack, and reads the main thread's from a text
/// with `sscanf`: 110 kB of the static binary are for that, and they go into faster code instead. The standard library asks for them
/// to say that a thread has overflowed its stack, on the stderr that it does not have here (`keep_stderr`), and does without.
#[cfg(target_feature = "crt-static")]
// SAFETY: it has the type of the function of that name, and writes nothing.
#[unsafe(no_mangle)]
extern "C" fn pthread_getattr_np(_: libc::pthread_t, _: *mut libc::pthread_attr_t) -> libc::c_int {
    libc::ENOSYS
}

fn fail(status: i32, line: &str) -> ! {
    say(line);
    exit(status)
}

/// Asks the instance on this machine whether it answers, as Docker's health check does. (A connection to 0.0.0.0 or [::] is one
/// to this machine.)
fn is_healthy(listen: SocketAddr) -> bool {
    let target = if own().is_some() { "/kv-store/key-count" } else { "/kv-store" };
    let request = Request { verb: "GET".into(), target: target.into(), ..Request::default() };
    request.send(&listen.to_string(), ANSWER_LIMIT).is_ok_and(|(answer, ..)| answer.status == 200)
}

// ---- The simulation: whole stores in one process --------------------------------------------------------------------

#[cfg(test)]
mod simulation {
    //! Runs stores of two to five nodes through random schedules: messages that get lost, come late or twice, nodes that
    //! sleep, die and start again, networks cut in one direction, rival coordinators, force. The nodes are the program's own
    //! code, from the request to the table. Half of the stores have one replica a shard: after every step no key may be answered
    //! for by two nodes; at the end every key must be answered for, and what clients saw must be explained by some order of their
    //! requests. The others have two or three: what is acknowledged must be on every replica that its writer could reach, sessions
    //! must never read less than they know of, and at the end all replicas must agree, on nothing older than what was
    //! acknowledged, contexts must be empty, and tombstones gone.
    //!
    //! `SEED=n` repeats one schedule, and tells it; `SCHEDULES=n` runs as many.

    use super::*;
    use std::cell::RefCell;
    use std::collections::HashSet;
    use std::pin::Pin;
    use std::rc::Rc;

    const KEYS: usize = 6;
    /// A client waits so long for an answer.
    const CLIENT: Duration = Duration::from_secs(8);

    type Task = Pin<Box<dyn Future<Output = ()>>>;

    enum Event {
        Poll(usize),
        Message {
            to: usize,
            envelope: Box<Envelope>,
            call: usize,
        },
        Relay {
            to: usize,
            request: Request,
            call: usize,
        },
        Push {
            to: usize,
            push: Push,
            call: usize,
        },
        /// A call ends at the node that made it.
        Result {
            call: usize,
            result: Ending,
        },
        Spawn {
            on: usize,
            life: u64,
            activity: Activity,
        },
        Wake(usize),
        Start(usize),
        Quiet,
    }

    /// How a call ended.
    enum Ending {
        Nothing,
        Reply(Box<(Status, Reply)>),
        Answer(Answer),
        Pushed(Pushed),
    }

    #[derive(Default)]
    struct Machine {
        /// None while it is dead.
        node: Option<Node>,
        /// Goes up each time it dies: what was begun before is gone.
        life: u64,
        asleep: bool,
        /// By key, how many deletions it is at.
        deleting: [u32; KEYS],
        /// What happened to it while it slept.
        backlog: Vec<Event>,
        /// It was removed by force while it was alive, and does not know yet: what it says does not count (the contract, "One
        /// replica: consistency").
        outlawed: Option<Version>,
        /// The table that it was last seen to go by as a member, in this life.
        seen: Option<Version>,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Did {
        Put(u32),
        Get,
        Delete,
        /// The node that may have had the key was killed.
        Vanish,
    }

    /// What a client did and saw. Without an end it is not known whether it took effect.
    #[derive(Clone, Debug)]
    struct Op {
        did: Did,
        start: Duration,
        end: Option<Duration>,
        /// The value that was there before, or that there was one or none.
        saw: Option<Seen>,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Seen {
        Nothing,
        Something,
        Value(u32),
    }

    struct State {
        seed: u64,
        random: u64,
        now: Duration,
        events: BTreeMap<(Duration, u64), Event>,
        sequence: u64,
        machines: Vec<Machine>,
        tasks: HashMap<usize, (usize, u64, Task)>,
        current: usize,
        /// The task that waits for a call, its machine and life, and what it was answered.
        calls: HashMap<usize, (usize, usize, u64)>,
        results: HashMap<usize, Ending>,
        cut: HashSet<(usize, usize)>,
        /// Of a hundred messages so many are lost, late, or come twice.
        trouble: u64,
        quiet: bool,
        quiet_until: Duration,
        history: Vec<Vec<Op>>,
        value: u32,
        told: bool,
        changes: usize,
        /// How long the nodes' locks keep off others.
        lease: Duration,
        /// A view was changed by force, which may give up anything.
        forced: bool,
        /// The versions of the store's tables.
        lineage: HashSet<Version>,
        /// How many replicas the first table has.
        factor: usize,
        /// Networks are cut often and for long, and nodes seldom die.
        is_cut_up: bool,
        /// A node is cut off from all others for longer than tombstones stay.
        is_long: bool,
        replicas: Replicas,
    }

    /// What is known of a store of several replicas, of which no write may be lost.
    #[derive(Default)]
    struct Replicas {
        /// By key: all records that were ever seen, by stamp; a deletion is None.
        seen: Vec<BTreeMap<u64, Option<u32>>>,
        /// By key: no acknowledged write was above this stamp, but those that went with all who had them.
        bound: Vec<u64>,
        /// By key: the highest stamp that any node has, and the highest that went with all who had it.
        highest: Vec<u64>,
        lost: Vec<u64>,
        /// By value: what its writer had seen.
        past: HashMap<u32, Causal>,
        sessions: Vec<Session>,
    }

    /// A client that hands on its context, and what it may rely on: by key the stamp that it has seen, or that what it has seen
    /// follows from.
    #[derive(Default)]
    struct Session {
        context: String,
        past: Causal,
        busy: bool,
    }

    const ADDRESSES: [&str; 5] = ["n0:1", "n1:1", "n2:1", "n3:1", "n4:1"];

    fn address(machine: usize) -> String {
        ADDRESSES[machine].to_owned()
    }

    fn machine_of(address: &str) -> usize {
        address[1..address.len() - 2].parse().expect("an address of a machine")
    }

    impl State {
        fn below(&mut self, limit: usize) -> usize {
            self.random = self.random.wrapping_add(0x9e3779b97f4a7c15);
            let mut mixed = self.random;
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58476d1ce4e5b9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d049bb133111eb);
            ((mixed ^ mixed >> 31) % limit as u64) as usize
        }

        fn percent(&mut self, percent: u64) -> bool {
            (self.below(100) as u64) < percent
        }

        fn at(&mut self, after: Duration, event: Event) {
            self.sequence += 1;
            self.events.insert((self.now + after, self.sequence), event);
        }

        fn tell(&self, what: impl FnOnce() -> String) {
            if self.told {
                println!("{:8.3} {}", self.now.as_secs_f64(), what());
            }
        }

        /// How long a message takes; None if it is lost.
        fn way(&mut self, from: usize, to: usize) -> Option<Duration> {
            let lost = from != to
                && (self.cut.contains(&(from, to))
                    || !self.quiet && {
                        let trouble = self.trouble;
                        self.percent(trouble)
                    });
            let most = match self.below(100) {
                0 if !self.quiet => 9_000_000,
                1..5 if !self.quiet => 1_000_000,
                _ => 4_000,
            };
            (!lost).then(|| Duration::from_micros(self.below(most) as u64 + 100))
        }

        /// Where a process is dead, its machine may still refuse connections.
        fn refuse(&mut self, call: usize) {
            if self.percent(50) {
                self.at(Duration::from_millis(1), Event::Result { call, result: Ending::Nothing });
            }
        }

        /// A call of a task; it ends after the limit at the latest.
        fn call(&mut self, machine: usize, limit: Duration) -> usize {
            self.sequence += 1;
            let (id, life) = (self.sequence as usize, self.machines[machine].life);
            self.calls.insert(id, (self.current, machine, life));
            self.at(limit, Event::Result { call: id, result: Ending::Nothing });
            id
        }

        /// Whether a machine goes by a table of the store: any other is a store of its own, which nobody asks.
        fn is_member(&self, machine: usize) -> bool {
            // One that left, and started again alone, is a store of its own again.
            let apart = |table: &Table| {
                let newest =
                    self.newest().is_some_and(|newest| newest.version.number > 0 && !newest.lists(&address(machine)));
                table.version.is_first() && table.view.len() == 1 && self.machines[machine].life > 0 && newest
            };
            self.table(machine).is_some_and(|table| self.lineage.contains(&table.version) && !apart(&table))
        }

        fn table(&self, machine: usize) -> Option<Arc<Table>> {
            self.machines[machine].node.as_ref()?.table()
        }

        /// The newest table of the store.
        fn newest(&self) -> Option<Arc<Table>> {
            let tables = (0..self.machines.len()).filter_map(|it| self.table(it));
            tables.filter(|table| self.lineage.contains(&table.version)).max_by_key(|table| table.version)
        }

        /// Notes which tables are the store's: those that were made from its first one.
        fn note_tables(&mut self) {
            let first: Vec<String> = self.first_view().into_iter().map(address).collect();
            for machine in 0..self.machines.len() {
                let Some(table) = self.table(machine) else { continue };
                if table.version.is_first() && (table.view == first || table.view.len() > 1)
                    || self.lineage.contains(&table.base)
                    || self.machines[machine].seen.is_some_and(|seen| self.lineage.contains(&seen))
                {
                    self.lineage.insert(table.version);
                }
                self.machines[machine].seen = table.lists(&address(machine)).then_some(table.version);
            }
        }

        /// Notes what a machine that dies, or is outlawed, may take with it.
        fn vanish(&mut self, machine: usize, end: Option<Duration>) {
            for key in 0..KEYS {
                let (hash, name) = (hash_of(name(key).as_bytes()), name(key));
                let node = self.machines[machine].node.as_ref();
                if node.is_some_and(|node| node.records.get(hash, name.as_bytes()).is_some()) {
                    let start = self.now;
                    self.history[key].push(Op { did: Did::Vanish, start, end, saw: None });
                }
            }
        }
    }

    impl State {
        /// Notes which records there are, and which went with all who had them: a deletion only if somebody `died`, since it may
        /// not be forgotten where an older record is left.
        fn note_records(&mut self, died: bool) {
            for key in 0..KEYS {
                let name = name(key);
                let hash = hash_of(name.as_bytes());
                let mut highest = 0;
                for machine in &self.machines {
                    let Some(node) = machine.node.as_ref().filter(|_| machine.outlawed.is_none()) else { continue };
                    let Some(record) = node.records.get(hash, name.as_bytes()) else { continue };
                    let value = str::from_utf8(record.value()).ok().and_then(|value| value.parse().ok());
                    self.replicas.seen[key].insert(record.stamp(), value);
                    highest = highest.max(record.stamp());
                }
                let bound = self.replicas.bound[key];
                let is_forgotten =
                    |stamp: u64| !died && self.replicas.seen[key].get(&stamp).is_some_and(Option::is_none);
                if highest < bound && !is_forgotten(bound) {
                    self.replicas.bound[key] = highest;
                }
                let before = self.replicas.highest[key];
                if highest < before && !is_forgotten(before) {
                    self.replicas.lost[key] = self.replicas.lost[key].max(before);
                }
                if highest > before || !is_forgotten(before) {
                    self.replicas.highest[key] = highest;
                }
            }
        }

        /// An acknowledged write is on every replica that can be reached, as far as the one that took it knows.
        fn note_acknowledged(&mut self, machine: usize, key: &[u8], value: Option<u32>, seed: u64) {
            let hash = hash_of(key);
            let Some(node) = &self.machines[machine].node else { return };
            let is_mine = node.table().is_some_and(|table| Some(table.shard_at(hash, key)) == node.shard());
            let Some(record) =
                node.records.get(hash, key).filter(|_| is_mine && self.machines[machine].outlawed.is_none())
            else {
                return;
            };
            let index = key_of(key);
            // It may have been followed by another one meanwhile. Of several deletions it is not known which one this was.
            let mut seen = self.replicas.seen[index].iter();
            let is_this = |record: &&Record| record.is_tombstone() && self.machines[machine].deleting[index] == 1;
            let written = match value {
                Some(_) => seen.find(|(_, it)| **it == value).map(|(stamp, _)| *stamp),
                None => Some(record).filter(is_this).map(Record::stamp).filter(|stamp| node.has_given(*stamp)),
            };
            let Some(stamp) = written else { return };
            for other in node.others().iter().filter(|other| !node.is_silent(other)) {
                let Some(there) = &self.machines[machine_of(other)].node else { continue };
                let takes_part = there.version() == node.version() && there.status().incoming.is_empty();
                let has = there.records.get(hash, key).is_some_and(|it| it.stamp() >= stamp);
                let gone = record.is_tombstone() && there.records.get(hash, key).is_none();
                assert!(!takes_part || has || gone, "SEED={seed}: n{machine} acknowledged what {other} does not have");
            }
            self.replicas.bound[index] = self.replicas.bound[index].max(stamp);
        }
    }

    fn name(key: usize) -> String {
        format!("k{key}")
    }

    fn key_of(name: &[u8]) -> usize {
        str::from_utf8(&name[1..]).expect("a name").parse().expect("a key")
    }

    #[derive(Clone)]
    struct There {
        state: Rc<RefCell<State>>,
        machine: usize,
        life: u64,
    }

    struct Wait<'a>(&'a There, usize);

    impl Future for Wait<'_> {
        type Output = Ending;
        fn poll(self: Pin<&mut Self>, _: &mut Context) -> Poll<Ending> {
            let mut state = self.0.state.borrow_mut();
            match state.results.remove(&self.1) {
                Some(result) => Poll::Ready(result),
                None => Poll::Pending,
            }
        }
    }

    impl World for There {
        fn with<T>(&self, action: impl FnOnce(&mut Node) -> T) -> T {
            let mut state = self.state.borrow_mut();
            let (now, told) = (state.now, state.told);
            let node = state.machines[self.machine].node.as_mut().expect("only living nodes run");
            node.now = node.now.max(now);
            let result = action(node);
            for line in node.lines.drain(..) {
                if told {
                    println!("{:8.3} n{}: {line}", now.as_secs_f64(), self.machine);
                }
            }
            node.garbage.clear();
            result
        }

        async fn deliver(&self, envelopes: Vec<Envelope>) -> Vec<Option<(Status, Reply)>> {
            let mut calls = Vec::new();
            for envelope in envelopes {
                let mut state = self.state.borrow_mut();
                let to = machine_of(&envelope.to);
                let call = state.call(self.machine, envelope.message.limit());
                if state.trouble > 0
                    && state.percent(3)
                    && let Some(way) = state.way(self.machine, to)
                {
                    state.at(way, Event::Message { to, envelope: Box::new(envelope.clone()), call });
                }
                if let Some(way) = state.way(self.machine, to) {
                    state.at(way, Event::Message { to, envelope: Box::new(envelope), call });
                }
                calls.push(call);
            }
            let mut answers = Vec::new();
            for call in calls {
                answers.push(if let Ending::Reply(reply) = Wait(self, call).await { Some(*reply) } else { None });
            }
            answers
        }

        async fn push(&self, pushes: Vec<Push>) -> Vec<Option<Pushed>> {
            let mut calls = Vec::new();
            for push in pushes {
                let mut state = self.state.borrow_mut();
                let to = machine_of(&push.to);
                let call = state.call(self.machine, PUSH_LIMIT);
                for _ in 0..1 + usize::from(state.trouble > 0 && state.percent(3)) {
                    if let Some(way) = state.way(self.machine, to) {
                        state.at(way, Event::Push { to, push: push.clone(), call });
                    }
                }
                calls.push(call);
            }
            let mut answers = Vec::new();
            for call in calls {
                answers.push(if let Ending::Pushed(answer) = Wait(self, call).await { Some(answer) } else { None });
            }
            answers
        }

        async fn relay(&self, node: &str, request: Request, patience: Duration) -> Result<Answer, Lost> {
            let call = {
                let mut state = self.state.borrow_mut();
                let to = machine_of(node);
                let call = state.call(self.machine, patience.min(Duration::from_secs(60)));
                if let Some(way) = state.way(self.machine, to) {
                    state.at(way, Event::Relay { to, request, call });
                }
                call
            };
            match Wait(self, call).await {
                Ending::Answer(answer) => Ok(answer),
                _ => Err(Lost { was_sent: true }),
            }
        }

        async fn sleep(&self, time: Duration) {
            let call = self.state.borrow_mut().call(self.machine, time);
            Wait(self, call).await;
        }

        fn spawn(&self, activity: Activity) {
            let mut state = self.state.borrow_mut();
            state.at(Duration::ZERO, Event::Spawn { on: self.machine, life: self.life, activity });
        }
    }

    struct Simulation {
        seed: u64,
        state: Rc<RefCell<State>>,
    }

    impl Simulation {
        fn new(seed: u64, told: bool) -> Simulation {
            let mut state = State {
                seed,
                random: seed.wrapping_mul(0x2545f4914f6cdd1d),
                now: Duration::from_secs(1_000_000),
                events: BTreeMap::new(),
                sequence: 0,
                machines: Vec::new(),
                tasks: HashMap::new(),
                current: 0,
                calls: HashMap::new(),
                results: HashMap::new(),
                cut: HashSet::new(),
                trouble: 0,
                quiet: true,
                quiet_until: Duration::ZERO,
                history: vec![Vec::new(); KEYS],
                value: 0,
                told,
                changes: 0,
                lease: Duration::from_millis(0),
                forced: false,
                lineage: HashSet::new(),
                factor: 1,
                is_cut_up: false,
                is_long: false,
                replicas: Replicas::default(),
            };
            let count = 2 + state.below(4);
            // Half of the stores have one replica a shard.
            state.factor = [1, 1, 2, 3][(seed % 4) as usize];
            state.is_cut_up = state.factor > 1 && seed % 8 > 3;
            state.is_long = state.is_cut_up && seed % 32 > 27;
            let sessions = (0..3).map(|_| Session { context: "{}".into(), ..Session::default() }).collect();
            let (seen, bound) = (vec![BTreeMap::new(); KEYS], vec![0; KEYS]);
            let (highest, lost) = (bound.clone(), bound.clone());
            state.replicas = Replicas { seen, bound, highest, lost, sessions, ..Replicas::default() };
            state.lease = Duration::from_millis([100, 500, 2000, 10_000][state.below(4)]);
            state.machines = (0..count).map(|_| Machine::default()).collect();
            Simulation { seed, state: Rc::new(RefCell::new(state)) }
        }

        fn there(&self, machine: usize) -> There {
            There { state: self.state.clone(), machine, life: self.state.borrow().machines[machine].life }
        }

        fn run_task(&self, machine: usize, task: impl Future<Output = ()> + 'static) {
            let mut state = self.state.borrow_mut();
            state.sequence += 1;
            let (id, life) = (state.sequence as usize, state.machines[machine].life);
            state.tasks.insert(id, (machine, life, Box::pin(task)));
            state.at(Duration::ZERO, Event::Poll(id));
        }

        fn start(&self, machine: usize, view: &[usize]) {
            {
                let mut state = self.state.borrow_mut();
                let (incarnation, now) = (state.random.wrapping_add(state.sequence) | 1, state.now);
                let view: Vec<String> = view.iter().map(|it| address(*it)).collect();
                state.tell(|| format!("n{machine} starts with {view:?}"));
                let factor = state.factor.min(view.len());
                let mut node = Node::new(address(machine), view, factor, incarnation, now);
                node.lease = state.lease;
                state.machines[machine].node = Some(node);
                state.machines[machine].outlawed = None;
            }
            let there = self.there(machine);
            self.run_task(machine, async move {
                loop {
                    keep_in_touch(&there);
                    let jitter = there.state.borrow_mut().below(20) as u64;
                    there.sleep(MEETINGS + Duration::from_millis(jitter)).await;
                }
            });
        }

        fn kill(&self, machine: usize) {
            let mut state = self.state.borrow_mut();
            let now = state.now;
            state.tell(|| format!("n{machine} is killed"));
            state.vanish(machine, Some(now));
            let dead = &mut state.machines[machine];
            dead.node = None;
            dead.life += 1;
            (dead.asleep, dead.seen, dead.deleting) = (false, None, [0; KEYS]);
            dead.backlog.clear();
            let life = dead.life;
            state.note_records(true);
            state.tasks.retain(|_, (on, of, _)| *on != machine || *of == life);
        }

        fn client(&self, machine: usize) {
            if self.state.borrow().factor > 1 {
                return self.causal_client(machine, None);
            }
            let there = self.there(machine);
            let (key, did) = {
                let mut state = self.state.borrow_mut();
                state.value += 1;
                let value = state.value;
                (state.below(KEYS), [Did::Put(value), Did::Put(value), Did::Get, Did::Get, Did::Delete][state.below(5)])
            };
            self.ask(there, key, did);
        }

        fn ask(&self, there: There, key: usize, did: Did) {
            let (verb, body) = match did {
                Did::Put(value) => ("PUT", format!("val={value}")),
                Did::Get => ("GET", String::new()),
                _ => ("DELETE", String::new()),
            };
            let request = Request {
                verb: verb.into(),
                target: format!("/kv-store/{}", name(key)),
                body: body.into(),
                ..Request::default()
            };
            let (index, start) = {
                let mut state = self.state.borrow_mut();
                let start = state.now;
                state.history[key].push(Op { did, start, end: None, saw: None });
                (state.history[key].len() - 1, start)
            };
            self.run_task(there.machine, async move {
                let name = name(key);
                let answer = answer_request(&there, name.as_bytes(), &request).await;
                let mut state = there.state.borrow_mut();
                let text = String::from_utf8_lossy(&answer.body).into_owned();
                state.tell(|| {
                    format!(
                        "n{} answers {} {name} {did:?}: {} {}",
                        there.machine,
                        request.verb,
                        answer.status,
                        text.trim()
                    )
                });
                let value = text.split('"').nth(7).and_then(|value| value.parse().ok());
                let saw = match answer.status {
                    404 | 201 => Seen::Nothing,
                    200 => value.filter(|_| did == Did::Get).map_or(Seen::Something, Seen::Value),
                    _ => return,
                };
                if state.now < start + CLIENT && state.machines[there.machine].outlawed.is_none() {
                    let end = Some(state.now);
                    let op = &mut state.history[key][index];
                    (op.end, op.saw) = (end, Some(saw));
                }
            });
        }

        /// A session reads or writes; `read` is the key that it must read.
        fn causal_client(&self, machine: usize, read: Option<(usize, usize)>) {
            let there = self.there(machine);
            let (session, key, did, context, past) = {
                let state = &mut *self.state.borrow_mut();
                state.value += 1;
                let value = state.value;
                let did = [Did::Put(value), Did::Put(value), Did::Get, Did::Get, Did::Delete][state.below(5)];
                let drawn = (state.below(3), state.below(if state.is_cut_up { 3 } else { KEYS }));
                let (session, key) = read.unwrap_or(drawn);
                let did = if read.is_some() { Did::Get } else { did };
                let it = &mut state.replicas.sessions[session];
                if std::mem::replace(&mut it.busy, true) && read.is_none() {
                    return;
                }
                let (context, past) = (it.context.clone(), it.past.clone());
                state.replicas.past.insert(value, past.clone());
                (session, key, did, context, past)
            };
            let (verb, value) = match did {
                Did::Put(value) => ("PUT", format!(r#""value":{value},"#)),
                Did::Get => ("GET", String::new()),
                _ => ("DELETE", String::new()),
            };
            let request = Request {
                verb: verb.into(),
                target: format!("/kv-store/keys/{}", name(key)),
                content_type: "application/json".into(),
                body: format!(r#"{{{value}"causal-context":{context}}}"#).into(),
                ..Request::default()
            };
            let seed = self.seed;
            self.run_task(there.machine, async move {
                let answer = answer_request(&there, name(key).as_bytes(), &request).await;
                let state = &mut *there.state.borrow_mut();
                let text = String::from_utf8_lossy(&answer.body).trim().to_owned();
                state.tell(|| {
                    let n = there.machine;
                    format!(
                        "n{n} answers session {session} {verb} {} {did:?} {context}: {} {text}",
                        name(key),
                        answer.status
                    )
                });
                let trusted = state.machines[there.machine].outlawed.is_none();
                state.replicas.sessions[session].busy = false;
                if !matches!(answer.status, 200 | 201 | 404) || !trusted {
                    return;
                }
                let value = text
                    .split_once(r#""value":"#)
                    .and_then(|(_, rest)| rest.split([',', '}']).next().and_then(|value| value.parse::<u32>().ok()));
                let seen = &state.replicas.seen[key];
                let stamp_of =
                    |value: u32| seen.iter().find(|(_, it)| **it == Some(value)).map_or(0, |(stamp, _)| *stamp);
                let known = past.get(&name(key)).copied().unwrap_or(0);
                let wanted = if known > state.replicas.lost[key] { known } else { 0 };
                let mut now = past;
                match (did, value) {
                    (Did::Get, Some(value)) => {
                        let stamp = stamp_of(value);
                        assert!(
                            stamp >= wanted,
                            "SEED={seed}: {} is older than what the session knows: {text}",
                            name(key)
                        );
                        let known = state.replicas.past.get(&value).cloned().unwrap_or_default();
                        for (key, stamp) in known.into_iter().chain([(name(key), stamp)]) {
                            let old = now.entry(key).or_default();
                            *old = stamp.max(*old);
                        }
                    }
                    (Did::Get, None) => {
                        let deleted = seen.range(wanted..).any(|(_, value)| value.is_none());
                        assert!(
                            wanted == 0 || deleted,
                            "SEED={seed}: the session knows of {}, which is not there",
                            name(key)
                        );
                    }
                    (Did::Put(value), _) => {
                        now.insert(name(key), stamp_of(value));
                    }
                    _ => {}
                }
                let context = text.split_once(r#""causal-context":"#).and_then(|(_, rest)| rest.split_once('}'));
                let it = &mut state.replicas.sessions[session];
                it.context = format!("{}}}", context.expect("the answer has a context").0);
                it.past = now;
            });
        }

        fn change(&self, machine: usize, view: Vec<usize>, force: bool) {
            self.state.borrow_mut().forced |= force;
            let there = self.there(machine);
            let request = Request { verb: "PUT".into(), target: "/kv-store/view-change".into(), ..Request::default() };
            self.state.borrow().tell(|| format!("n{machine} is asked for {view:?}, force {force}"));
            let view: Vec<String> = view.into_iter().map(address).collect();
            let factor = {
                let mut state = self.state.borrow_mut();
                let factor = 1 + state.below(3);
                // A store with one replica a shard keeps to it: it is judged by other rules.
                (state.factor > 1).then(|| factor.max(2)).filter(|factor| *factor <= view.len() && state.percent(30))
            };
            if self.state.borrow().factor > 1 && view.len() < 2 {
                return;
            }
            let more = factor.map_or(String::new(), |factor| format!(r#","repl-factor":{factor}"#));
            let wanted = WantedView { view: view.clone(), factor, force };
            // Whoever coordinates in the end reads it from the body.
            let body = format!(r#"{{"view":{view:?},"force":{force}{more}}}"#).into_bytes();
            self.run_task(machine, async move {
                let answer = answer_view_change(&there, &Request { body, ..request }, &wanted).await;
                let mut state = there.state.borrow_mut();
                state.changes += usize::from(answer.status == 200);
                state.tell(|| format!("n{} answers {}", there.machine, String::from_utf8_lossy(&answer.body).trim()));
            });
        }

        /// Does one event. False if nothing is left to do.
        fn step(&self) -> bool {
            let event = {
                let mut state = self.state.borrow_mut();
                let Some(((time, _), event)) = state.events.pop_first() else { return false };
                state.now = time;
                let on = match &event {
                    Event::Poll(task) => state.tasks.get(task).map(|(machine, ..)| *machine),
                    Event::Message { to, .. } | Event::Relay { to, .. } | Event::Push { to, .. } => Some(*to),
                    Event::Result { call, .. } => state.calls.get(call).map(|(_, machine, _)| *machine),
                    Event::Spawn { on, .. } => Some(*on),
                    _ => None,
                };
                if let Some(on) = on
                    && state.machines[on].asleep
                {
                    state.machines[on].backlog.push(event);
                    return true;
                }
                event
            };
            let changes = !matches!(event, Event::Result { .. } | Event::Spawn { .. });
            match event {
                Event::Poll(id) => self.poll(id),
                Event::Message { to, envelope, call } => self.message(to, *envelope, call),
                Event::Relay { to, request, call } => self.relayed(to, request, call),
                Event::Push { to, push, call } => self.pushed(to, push, call),
                Event::Result { call, result } => {
                    let mut state = self.state.borrow_mut();
                    if let Some((task, ..)) = state.calls.remove(&call) {
                        state.results.insert(call, result);
                        state.at(Duration::ZERO, Event::Poll(task));
                    }
                }
                Event::Spawn { on, life, activity } => {
                    if self.state.borrow().machines[on].life == life {
                        self.run_task(on, run(self.there(on), activity));
                    }
                }
                Event::Wake(machine) => self.wake(machine),
                Event::Start(machine) => self.start_again(machine),
                Event::Quiet => {
                    let mut state = self.state.borrow_mut();
                    state.quiet = state.now < state.quiet_until;
                }
            }
            if changes {
                self.check_owners();
            }
            true
        }

        fn wake(&self, machine: usize) {
            let mut state = self.state.borrow_mut();
            if std::mem::take(&mut state.machines[machine].asleep) {
                state.tell(|| format!("n{machine} wakes"));
                for event in std::mem::take(&mut state.machines[machine].backlog) {
                    let after = Duration::from_micros(state.below(3000) as u64);
                    state.at(after, event);
                }
            }
        }

        fn poll(&self, id: usize) {
            let Some((machine, life, mut task)) = self.state.borrow_mut().tasks.remove(&id) else { return };
            let mut state = self.state.borrow_mut();
            if state.machines[machine].life != life {
                return;
            }
            state.current = id;
            drop(state);
            if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
                self.state.borrow_mut().tasks.insert(id, (machine, life, task));
            }
        }

        fn message(&self, to: usize, envelope: Envelope, call: usize) {
            let from = machine_of(&envelope.from);
            if self.state.borrow().machines[to].node.is_none() {
                return self.state.borrow_mut().refuse(call);
            }
            let reply = receive(&self.there(to), envelope);
            let mut state = self.state.borrow_mut();
            if let Some(way) = state.way(to, from) {
                state.at(way, Event::Result { call, result: Ending::Reply(Box::new(reply)) });
            }
        }

        fn pushed(&self, to: usize, push: Push, call: usize) {
            let from = machine_of(&push.from);
            if self.state.borrow().machines[to].node.is_none() {
                return self.state.borrow_mut().refuse(call);
            }
            let keys: Vec<String> =
                push.records.iter().map(|(_, bytes, _)| String::from_utf8_lossy(&bytes[1..]).into_owned()).collect();
            let answer = self.there(to).with(|node| node.take_push(push));
            let mut state = self.state.borrow_mut();
            state.tell(|| format!("n{from} pushes {keys:?} to n{to}: {answer:?}"));
            if let Some(way) = state.way(to, from) {
                state.at(way, Event::Result { call, result: Ending::Pushed(answer) });
            }
        }

        fn relayed(&self, to: usize, request: Request, call: usize) {
            if self.state.borrow().machines[to].node.is_none() {
                return self.state.borrow_mut().refuse(call);
            }
            let there = self.there(to);
            self.run_task(to, async move {
                let answer = match request.route().0 {
                    Resource::Key(key) => answer_request(&there, &key, &request).await,
                    _ => match wanted_view(&request.body) {
                        Ok(wanted) => Box::pin(answer_view_change(&there, &request, &wanted)).await,
                        Err(refusal) => refusal.answer(Vocabulary::Json, "PUT"),
                    },
                };
                let mut state = there.state.borrow_mut();
                let from = state.calls.get(&call).map_or(to, |(_, machine, _)| *machine);
                let trusted = state.machines[to].outlawed.is_none();
                if let Some(way) = state.way(to, from).filter(|_| trusted) {
                    state.at(way, Event::Result { call, result: Ending::Answer(answer) });
                }
            });
        }

        /// No key is answered for by two nodes.
        fn check_owners(&self) {
            let state = &mut *self.state.borrow_mut();
            state.note_tables();
            self.outlaw(state);
            if state.factor > 1 {
                return state.note_records(false);
            }
            let counts = |machine: &usize| state.machines[*machine].outlawed.is_none() && state.is_member(*machine);
            let machines: Vec<usize> = (0..state.machines.len()).filter(counts).collect();
            for key in 0..KEYS {
                let name = name(key);
                let hash = hash_of(name.as_bytes());
                let here = |node: &Node| node.place_by_table(hash, name.as_bytes()) == Place::Here;
                let has = |machine: &usize| state.machines[*machine].node.as_ref().is_some_and(here);
                let owners: Vec<usize> = machines.iter().copied().filter(has).collect();
                assert!(
                    owners.len() < 2,
                    "SEED={}: at {:.3} {name} is answered for by {owners:?}",
                    self.seed,
                    state.now.as_secs_f64()
                );
            }
        }

        /// Whoever was left out of a table while it was alive, by force, and goes by an older one, does not count any more.
        fn outlaw(&self, state: &mut State) {
            let Some(newest) = state.newest() else { return };
            for machine in 0..state.machines.len() {
                let Some(version) = state.machines[machine].node.as_ref().map(Node::version) else { continue };
                let own = address(machine);
                let lives_by_it = state.is_member(machine)
                    && state.table(machine).is_some_and(|table| {
                        table.shard_of(&own).is_some_and(|shard| table.ranges.iter().any(|range| range.shard == shard))
                    });
                let left_out = lives_by_it
                    && version.is_some_and(|version| version.epoch < newest.version.epoch)
                    && !newest.lists(&own)
                    && !newest.sources().contains(&own);
                if left_out && state.machines[machine].outlawed.is_none() {
                    state.tell(|| format!("n{machine} is left out"));
                    if state.factor > 1 && !state.forced {
                        self.check_given_up(state, machine);
                    }
                    state.vanish(machine, None);
                    state.machines[machine].outlawed = Some(newest.version);
                    state.note_records(true);
                } else if !left_out {
                    state.machines[machine].outlawed = None;
                }
            }
        }

        /// Whoever is left out without force takes nothing with it but what it alone took while it was cut off.
        fn check_given_up(&self, state: &State, machine: usize) {
            let record = |node: &Node, name: &str| node.records.get(hash_of(name.as_bytes()), name.as_bytes()).cloned();
            for key in 0..KEYS {
                let name = name(key);
                let gone = state.machines[machine].node.as_ref().expect("it lives");
                let Some(lost) = record(gone, &name).filter(|it| it.stamp() == state.replicas.bound[key]) else {
                    continue;
                };
                let others = state.machines.iter().enumerate().filter(|(it, _)| *it != machine);
                let kept =
                    others.filter_map(|(_, it)| record(it.node.as_ref()?, &name)).any(|it| it.stamp() >= lost.stamp());
                assert!(kept || gone.has_given(lost.stamp()), "SEED={}: {name} is given up with n{machine}", self.seed);
            }
        }

        // -- Trouble

        fn random_fault(&self, first: &[usize]) {
            let (count, roll, one, other) = {
                let mut state = self.state.borrow_mut();
                let count = state.machines.len();
                (count, state.below(100), state.below(count), state.below(count))
            };
            let alive = |machine: usize| self.state.borrow().machines[machine].node.is_some();
            let awake = |machine: usize| alive(machine) && !self.state.borrow().machines[machine].asleep;
            // Where networks are cut, most of what else happens are requests.
            let (is_cut_up, is_long) = (self.state.borrow().is_cut_up, self.state.borrow().is_long);
            let is_cut_up = is_cut_up && !self.state.borrow_mut().percent(15);
            match if is_cut_up && roll < 95 || is_long { 0 } else { roll } {
                0..58 if awake(one) && self.state.borrow().is_member(one) => self.client(one),
                58..74 if awake(one) => {
                    let mut view: Vec<usize> = (0..count).filter(|_| self.state.borrow_mut().percent(65)).collect();
                    if self.state.borrow_mut().percent(50) {
                        view.retain(|it| alive(*it));
                    }
                    let force = view.iter().any(|it| alive(*it)) && self.state.borrow_mut().percent(25);
                    // Force is for nodes that are dead.
                    if force {
                        view.extend((0..count).filter(|it| alive(*it) && !view.contains(it)).collect::<Vec<_>>());
                        view.retain(|it| alive(*it));
                    }
                    // A node that is none of the store is asked to join it, not to make another.
                    let of_the_store = |it: usize| {
                        let state = self.state.borrow();
                        state.is_member(it) && state.table(it).is_some_and(|table| table.lists(&address(it)))
                    };
                    if of_the_store(one) && !view.is_empty() || view.iter().any(|it| of_the_store(*it)) {
                        self.change(one, view, force);
                    }
                }
                74..80 if awake(one) => {
                    let mut state = self.state.borrow_mut();
                    let millis = [200, 1000, 3000, 15000][state.below(4)] + state.below(500) as u64;
                    state.tell(|| format!("n{one} sleeps"));
                    state.machines[one].asleep = true;
                    state.at(Duration::from_millis(millis), Event::Wake(one));
                }
                80..86 if alive(one) => {
                    self.kill(one);
                    let millis = [10, 200, 2000, 6000][self.state.borrow_mut().below(4)];
                    self.state.borrow_mut().at(Duration::from_millis(millis), Event::Start(one));
                }
                86..90 => drop(self.state.borrow_mut().cut.insert((one, other))),
                90..98 if !is_cut_up => self.state.borrow_mut().cut.clear(),
                98 if !is_cut_up => {
                    // All of the first view at once.
                    for machine in first.iter().copied().filter(|it| alive(*it)) {
                        self.kill(machine);
                        self.state.borrow_mut().at(Duration::from_millis(5), Event::Start(machine));
                    }
                }
                _ if is_cut_up => {
                    let mut state = self.state.borrow_mut();
                    // One or two pairs at a time, half of them in one direction only.
                    if state.cut.len() > state.below(4) {
                        state.cut.clear();
                    }
                    state.cut.insert((one, other));
                    if state.percent(50) {
                        state.cut.insert((other, one));
                    }
                    let cut = state.cut.clone();
                    state.tell(|| format!("cut are {cut:?}"));
                }
                _ => {}
            }
        }

        /// Starts a machine again, with its first view, the present one, or none. If all whom it asks are blank as well, they
        /// can learn of the present table only from those who live by it: these must reach them within a second (the
        /// contract).
        fn start_again(&self, machine: usize) {
            if self.state.borrow().machines[machine].node.is_some() {
                return;
            }
            let (view, must_meet) = {
                let mut state = self.state.borrow_mut();
                let present =
                    state.newest().map(|table| table.view.iter().map(|it| machine_of(it)).collect::<Vec<_>>());
                let first = state.first_view();
                let known = present.as_ref().is_some_and(|view| view.contains(&machine));
                let view = match state.below(4) {
                    0 if known => vec![machine],
                    // Nodes that left, and ask none that stayed, are a store of their own.
                    1 | 2 if present.as_ref().is_none_or(|present| first.iter().any(|it| present.contains(it))) => {
                        first
                    }
                    _ => present.unwrap_or(first),
                };
                let newest = state.newest();
                let knows = |it: &usize| {
                    newest.as_ref().is_some_and(|table| {
                        table.lists(&address(*it)) && state.table(*it).is_some_and(|it| it.version == table.version)
                    })
                };
                let must_meet = !view.iter().any(|it| *it != machine && knows(it));
                (view, must_meet)
            };
            if must_meet {
                let count = self.state.borrow().machines.len();
                (0..count).for_each(|it| self.wake(it));
                let mut state = self.state.borrow_mut();
                state.cut.clear();
                state.quiet = true;
                state.quiet_until = state.now + Duration::from_millis(1600);
                state.at(Duration::from_millis(1600), Event::Quiet);
            }
            self.start(machine, &view);
        }

        fn run(&self) {
            let (count, first) = {
                let state = self.state.borrow_mut();
                (state.machines.len(), state.first_view())
            };
            for machine in 0..count {
                let view = if first.contains(&machine) { first.clone() } else { vec![machine] };
                self.start(machine, &view);
            }
            self.for_a_while(Duration::from_millis(1600), |_| {});
            let length = {
                let mut state = self.state.borrow_mut();
                (state.quiet, state.trouble) = (false, [0, 0, 5, 20][state.below(4)]);
                if state.is_long {
                    let last = count - 1;
                    (0..last).for_each(|it| state.cut.extend([(it, last), (last, it)]));
                }
                if state.is_long { 40_000 } else { [2000, 3000, 5000, 12000][state.below(4)] }
            };
            self.for_a_while(Duration::from_millis(length), |simulation| simulation.random_fault(&first));
            self.heal();
        }

        /// Runs for a while, and causes trouble every now and then.
        fn for_a_while(&self, time: Duration, trouble: impl Fn(&Simulation)) {
            let end = self.state.borrow().now + time;
            let mut next = self.state.borrow().now;
            while self.state.borrow().now < end && self.step() {
                let now = self.state.borrow().now;
                if now >= next {
                    let longest = if self.state.borrow().is_long { 1000 } else { 80 };
                    next = now + Duration::from_millis(self.state.borrow_mut().below(longest) as u64);
                    if !self.state.borrow().quiet {
                        trouble(self);
                    }
                }
            }
        }

        /// All is well again: every node lives, every message arrives. Soon every key must be answered for through every node.
        fn heal(&self) {
            let count = self.state.borrow().machines.len();
            {
                let mut state = self.state.borrow_mut();
                state.tell(|| "all is well".into());
                (state.quiet, state.trouble) = (true, 0);
                state.cut.clear();
                state.events.retain(|_, event| !matches!(event, Event::Quiet));
            }
            for machine in 0..count {
                self.wake(machine);
                self.start_again(machine);
            }
            self.state.borrow_mut().events.retain(|_, event| !matches!(event, Event::Quiet));
            // All may have died at once: what they then start with may be any of several views, and nothing is lost that was
            // not.
            if self.state.borrow().newest().is_none() {
                return;
            }
            for _ in 0..600 {
                self.for_a_while(Duration::from_millis(200), |_| {});
                if self.is_settled() {
                    break;
                }
            }
            assert!(
                self.is_settled(),
                "SEED={}: the nodes do not come to go by one table: {}",
                self.seed,
                self.describe()
            );
            let members: Vec<usize> = (0..count).filter(|it| self.state.borrow().is_member(*it)).collect();
            if self.state.borrow().factor > 1 {
                return self.check_replicas(&members);
            }
            let before: Vec<usize> = self.state.borrow().history.iter().map(Vec::len).collect();
            for machine in members {
                (0..KEYS).for_each(|key| self.ask(self.there(machine), key, Did::Get));
            }
            let answered =
                |key: usize| self.state.borrow().history[key][before[key]..].iter().all(|op| op.end.is_some());
            for _ in 0..100 {
                self.for_a_while(Duration::from_millis(50), |_| {});
                if (0..KEYS).all(answered) {
                    break;
                }
            }
            let state = self.state.borrow();
            for (key, history) in state.history.iter().enumerate() {
                assert!(
                    answered(key),
                    "SEED={}: {} is not answered for at the end: {}",
                    self.seed,
                    name(key),
                    self.describe()
                );
                assert!(is_linearizable(history), "SEED={}: {} was not kept: {history:#?}", self.seed, name(key));
            }
        }

        /// Soon the replicas agree, on nothing older than what was acknowledged, and no context is needed any more.
        fn check_replicas(&self, members: &[usize]) {
            let agree = || {
                if !self.is_settled() {
                    return false;
                }
                let state = self.state.borrow();
                let newest = state.newest().unwrap_or_default();
                (0..KEYS).all(|key| {
                    let name = name(key);
                    let hash = hash_of(name.as_bytes());
                    let stamp = |node: &String| {
                        let node = state.machines[machine_of(node)].node.as_ref();
                        node.and_then(|node| node.records.find(hash, name.as_bytes()).map(Record::stamp))
                    };
                    let stamps: HashSet<Option<u64>> =
                        newest.replicas(newest.shard_at(hash, name.as_bytes())).iter().map(stamp).collect();
                    stamps.len() == 1
                })
            };
            for _ in 0..50 {
                self.for_a_while(Duration::from_millis(100), |_| {});
                if agree() {
                    break;
                }
            }
            assert!(agree(), "SEED={}: the replicas do not agree: {}", self.seed, self.describe());
            self.check_bounds();
            self.for_a_while(Duration::from_millis(6000), |_| {});
            for round in 0..2 {
                for machine in members {
                    for session in 0..3 {
                        for key in 0..KEYS {
                            self.state.borrow_mut().replicas.sessions[session].busy = false;
                            self.causal_client(*machine, Some((session, key)));
                            for _ in 0..300 {
                                self.for_a_while(Duration::from_millis(20), |_| {});
                                if !self.state.borrow().replicas.sessions[session].busy {
                                    break;
                                }
                            }
                            let state = self.state.borrow();
                            let it = &state.replicas.sessions[session];
                            assert!(
                                !it.busy,
                                "SEED={}: {} is not answered at the end: {}",
                                self.seed,
                                name(key),
                                self.describe()
                            );
                            assert!(
                                round == 0 || it.context == "{}",
                                "SEED={}: a context of {} in a healthy store: {}",
                                self.seed,
                                it.context,
                                self.describe()
                            );
                        }
                    }
                }
            }
            self.for_a_while(Duration::from_millis(40_000), |_| {});
            assert!(agree(), "SEED={}: the replicas do not agree in the end", self.seed);
            self.check_bounds();
            let state = self.state.borrow();
            let has_tombstones = |node: &Node| {
                (0..KEYS).any(|key| {
                    let name = name(key);
                    node.records.get(hash_of(name.as_bytes()), name.as_bytes()).is_some_and(Record::is_tombstone)
                })
            };
            for machine in members {
                let node = state.machines[*machine].node.as_ref();
                assert!(!node.is_some_and(has_tombstones), "SEED={}: n{machine} keeps a tombstone", self.seed);
            }
        }

        fn check_bounds(&self) {
            let state = self.state.borrow();
            let newest = state.newest().unwrap_or_default();
            for key in 0..KEYS {
                let (name, bound) = (name(key), state.replicas.bound[key]);
                let hash = hash_of(name.as_bytes());
                let owner = newest.replicas(newest.shard_at(hash, name.as_bytes())).remove(0);
                let node = state.machines[machine_of(&owner)].node.as_ref().expect("all live");
                let found = node.records.find(hash, name.as_bytes()).map(Record::stamp);
                let deleted = state.replicas.seen[key].range(bound..).any(|(_, value)| value.is_none());
                let kept = found.map_or(bound == 0 || deleted, |stamp| stamp >= bound);
                assert!(kept, "SEED={}: {name} is at {found:?}, but {bound} was acknowledged", self.seed);
            }
        }

        /// All members of the newest table go by it and have what it gives them.
        fn is_settled(&self) -> bool {
            let state = self.state.borrow();
            if state.machines.iter().any(|machine| machine.outlawed.is_some()) {
                return false;
            }
            // All nodes may have died at once, and what they had with them.
            let newest = state.newest().unwrap_or_default();
            (0..state.machines.len()).all(|machine| {
                let Some(node) = &state.machines[machine].node else { return false };
                let has_all =
                    node.version() == Some(newest.version) && node.may_answer() && node.status().incoming.is_empty();
                has_all || node.version().is_some() && !newest.lists(&address(machine))
            })
        }

        fn describe(&self) -> String {
            let state = self.state.borrow();
            let describe = |it: &Machine| {
                it.node.as_ref().map_or("dead".into(), |node| {
                    let status = node.status();
                    format!(
                        "{} {:?} incoming {:?} promises {:?}\n",
                        node.own(),
                        status.version,
                        status.incoming,
                        status.promises
                    )
                })
            };
            state.machines.iter().map(describe).collect()
        }
    }

    /// What `begin` does in the program.
    async fn answer_request(there: &There, key: &[u8], request: &Request) -> Answer {
        let (_, vocabulary) = request.route();
        let context = match causal_context(request, vocabulary) {
            Ok(context) => context,
            Err(refusal) => return refusal.answer(vocabulary, &request.verb),
        };
        let action = Action::of(key, request, vocabulary);
        let deletions = u32::from(request.verb == "DELETE");
        there.state.borrow_mut().machines[there.machine].deleting[key_of(key)] += deletions;
        let perform = |node: &mut Node| (perform(node, hash_of(key), key, action, context, request.origin), node.now);
        let (tried, began) = there.with(perform);
        let answer = answer_for_key(there, key, tried, began, request, vocabulary).await;
        let state = &mut *there.state.borrow_mut();
        // Who relayed it acknowledged nothing.
        let is_own = !String::from_utf8_lossy(&answer.body).contains(r#""address""#);
        if state.factor > 1 && request.verb != "GET" && matches!(answer.status, 200 | 201) && is_own {
            state.note_records(false);
            let value = member(&request.body, "value").ok().and_then(|value| value.parse().ok());
            state.note_acknowledged(there.machine, key, value, state.seed);
        }
        state.machines[there.machine].deleting[key_of(key)] -= deletions;
        answer
    }

    impl State {
        fn first_view(&self) -> Vec<usize> {
            // The same in every start: it depends on the seed alone.
            let count = self.machines.len();
            (0..if self.is_cut_up { count } else { count.div_ceil(2) }).collect()
        }
    }

    /// Whether some order of these requests explains what they saw (Wing and Gong, 1993): each takes effect at one moment
    /// between its start and its end. One without an end may take effect at any moment after its start, or never.
    fn is_linearizable(history: &[Op]) -> bool {
        // A read that was not answered says nothing.
        let ops: Vec<&Op> = history.iter().filter(|op| op.did != Did::Get || op.end.is_some()).collect();
        let must: u128 = ops.iter().enumerate().filter(|(_, op)| op.saw.is_some()).map(|(index, _)| 1 << index).sum();
        assert!(ops.len() <= 128, "too long a history to be checked");
        let mut seen: HashSet<(u128, Option<u32>)> = HashSet::new();
        let mut open = vec![(0u128, None)];
        while let Some((done, value)) = open.pop() {
            if done & must == must {
                return true;
            } else if !seen.insert((done, value)) {
                continue;
            }
            let left = |index: usize| done & 1 << index == 0;
            let first_end =
                (0..ops.len()).filter(|it| left(*it) && must & 1 << it != 0).filter_map(|it| ops[it].end).min();
            let last_start = (0..ops.len()).filter(|it| !left(*it)).map(|it| ops[it].start).max();
            for (index, op) in ops.iter().enumerate().filter(|(index, _)| left(*index)) {
                let after = first_end.is_some_and(|end| op.start > end);
                let before = op.end.zip(last_start).is_some_and(|(end, start)| end < start);
                let fits = match op.saw {
                    Some(Seen::Nothing) => value.is_none(),
                    Some(Seen::Something) => value.is_some(),
                    Some(Seen::Value(seen)) => value == Some(seen),
                    None => true,
                };
                if !after && !before && fits {
                    let next = match op.did {
                        Did::Put(value) => Some(value),
                        Did::Get => value,
                        Did::Delete | Did::Vanish => None,
                    };
                    open.push((done | 1 << index, next));
                }
            }
        }
        false
    }

    fn number(variable: &str) -> Option<u64> {
        std::env::var(variable).ok()?.parse().ok()
    }

    #[test]
    fn two_sides_of_a_cut_do_not_both_change_the_view() {
        let simulation = store_of_four();
        // Each side has a replica of each shard.
        for (one, other) in [(0, 1), (0, 3), (2, 1), (2, 3)] {
            simulation.state.borrow_mut().cut.extend([(one, other), (other, one)]);
        }
        for _ in 0..10 {
            simulation.change(0, vec![0, 2], false);
            simulation.change(1, vec![1, 3], false);
            simulation.for_a_while(Duration::from_millis(8000), |_| {});
        }
        assert_eq!(simulation.state.borrow().changes, 0, "{}", simulation.describe());
    }

    /// Two shards of two replicas each, with all keys.
    fn store_of_four() -> Simulation {
        let simulation = Simulation::new(2, false);
        let first = [0, 1, 2, 3];
        {
            let mut state = simulation.state.borrow_mut();
            state.machines.truncate(0);
            state.machines.extend(first.map(|_| Machine::default()));
            (state.factor, state.lease) = (2, Duration::from_millis(100));
        }
        first.iter().for_each(|machine| simulation.start(*machine, &first));
        simulation.for_a_while(Duration::from_millis(1600), |_| {});
        (0..KEYS).for_each(|key| simulation.ask(simulation.there(0), key, Did::Put(key as u32 + 1)));
        simulation.for_a_while(Duration::from_millis(500), |_| {});
        simulation
    }

    #[test]
    fn a_replica_that_has_not_fetched_yet_vouches_for_nobody() {
        let (simulation, first) = (store_of_four(), [0, 1, 2, 3]);
        // The other replica of n1's shard sleeps, so n1 cannot fetch what it had.
        simulation.state.borrow_mut().machines[0].asleep = true;
        simulation.kill(1);
        simulation.start(1, &first);
        simulation.for_a_while(Duration::from_millis(3000), |_| {});
        simulation.change(2, vec![1, 2, 3], false);
        simulation.for_a_while(Duration::from_millis(8000), |_| {});
        assert_eq!(simulation.state.borrow().changes, 0, "{}", simulation.describe());
        simulation.wake(0);
        simulation.for_a_while(Duration::from_millis(5000), |_| {});
        let state = simulation.state.borrow();
        let keys = |machine: &Machine| machine.node.as_ref().map_or(0, Node::keys);
        assert_eq!(keys(&state.machines[1]) + keys(&state.machines[2]), KEYS, "{}", simulation.describe());
    }

    #[test]
    fn random_schedules_keep_every_key_with_one_node() {
        if let Some(seed) = number("SEED") {
            return Simulation::new(seed, true).run();
        }
        let schedules = number("SCHEDULES").unwrap_or(6_000);
        let first = number("FIRST").unwrap_or(0);
        let threads = thread::available_parallelism().map_or(2, |it| it.get() as u64);
        let failed = AtomicBool::new(false);
        let (changes, requests) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for thread in 0..threads {
                let (failed, changes, requests) = (&failed, &changes, &requests);
                scope.spawn(move || {
                    for seed in (first..first + schedules).filter(|seed| seed % threads == thread) {
                        let simulation = Simulation::new(seed, false);
                        let run = std::panic::AssertUnwindSafe(|| simulation.run());
                        if failed.load(SeqCst) {
                            return;
                        } else if catch_unwind(run).is_err() {
                            println!("SEED={seed} repeats it");
                            return failed.store(true, SeqCst);
                        }
                        let state = simulation.state.borrow();
                        changes.fetch_add(state.changes as u32, SeqCst);
                        requests.fetch_add(
                            state.history.iter().flatten().filter(|op| op.end.is_some()).count() as u32,
                            SeqCst,
                        );
                    }
                });
            }
        });
        assert!(!failed.load(SeqCst), "a schedule failed: its seed is above");
        println!("{schedules} schedules: {changes:?} view changes, {requests:?} requests answered");
        // A simulation in which nothing happens would pass as well.
        assert!(
            schedules < 1000
                || 2 * changes.load(SeqCst) as u64 > schedules && requests.load(SeqCst) as u64 > 10 * schedules
        );
    }
}

// ---- Unit tests -----------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    /// Numbers that look random and are the same in every run.
    struct Numbers(u64);
    impl Numbers {
        fn below(&mut self, limit: usize) -> usize {
            self.0 += 1;
            (hash_of(&self.0.to_be_bytes()) % limit as u64) as usize
        }
        fn nodes(&mut self, least: usize) -> Vec<String> {
            let mut nodes: Vec<String> = (1..=9).map(|number| format!("n{number}:1")).collect();
            let count = least + self.below(6);
            while nodes.len() > count {
                nodes.remove(self.below(nodes.len()));
            }
            nodes
        }
    }

    fn put(records: &mut Records, key: &str) {
        records.insert(hash_of(key.as_bytes()), Record::new(key.as_bytes(), r#""value""#));
    }

    /// A whole store in one place: the table, and what each node has.
    type Store = (Table, BTreeMap<String, Records>);

    fn put_at_owner(store: &mut Store, key: &str) {
        let (hash, name) = (hash_of(key.as_bytes()), key.as_bytes());
        let owner = store.0.replicas(store.0.shard_at(hash, name)).remove(0);
        put(store.1.entry(owner).or_default(), key);
    }

    /// Gives all records of some ranges to their owners, from whoever has them.
    fn settle(store: &mut Store) {
        for (span, range) in store.0.spans() {
            for source in range.sources.iter().flatten() {
                let mut span = span.clone();
                while span.from < span.to {
                    let giver = store.1.entry(source.clone()).or_default();
                    let (records, to) = giver.first_of(&span, 100);
                    let given = Span { from: span.from.clone(), to: to.clone() };
                    giver.forget(&given);
                    let owner = store.1.entry(store.0.replicas(range.shard).remove(0)).or_default();
                    records.into_iter().for_each(|record| drop(owner.insert(hash_of(record.key()), record)));
                    span.from = to;
                }
            }
        }
    }

    /// What a view change does, without the network. Returns how many keys moved.
    fn change(store: &mut Store, view: &[String]) -> usize {
        let (table, records) = &*store;
        let change = Change::new(table, view, 1);
        let held: Vec<usize> = table.view.iter().map(|node| records.get(node).map_or(0, Records::len)).collect();
        let (moves, _) = change.plan(&held);
        let mut given: HashMap<usize, usize> = HashMap::new();
        let mut cuts = Vec::new();
        for (giver, receiver, count) in &moves {
            let sum = given.entry(*giver).or_default();
            *sum += count;
            let place = records[&table.view[*giver]].nth_highest(*sum, &[Span::all()]);
            cuts.push(Cut { giver: *giver, place, receiver: *receiver });
        }
        let version = Version { number: table.version.number + 1, ..Version::default() };
        store.0 = table.next(version, &change, &cuts, &[], true);
        assert!(store.0.is_valid(), "{:?}", store.0);
        settle(store);
        moves.iter().map(|(.., count)| count).sum()
    }

    #[test]
    fn shards_differ_by_one_key_and_no_key_moves_without_need() {
        let mut numbers = Numbers(1);
        for case in 0..300 {
            let view = numbers.nodes(1);
            let mut store: Store = (Table::first(view, 1), BTreeMap::new());
            let keys = [0, 1, 2, 3, 7, 10, 100, 1000][case % 8];
            (0..keys).for_each(|number| put_at_owner(&mut store, &format!("{case} {number}")));
            for round in 0..4 {
                let view = numbers.nodes(1);
                let total: usize = store.1.values().map(Records::len).sum();
                let (least, rest) = (total / view.len(), total % view.len());
                // What nodes have above their target, if those with most keys may keep one more.
                let mut held: Vec<usize> = view.iter().map(|node| store.1.get(node).map_or(0, Records::len)).collect();
                held.sort_by_key(|count| std::cmp::Reverse(*count));
                let stays: usize =
                    held.iter().enumerate().map(|(rank, count)| (*count).min(least + usize::from(rank < rest))).sum();
                assert_eq!(change(&mut store, &view), total - stays, "case {case}, round {round}");
                let sizes: Vec<usize> = view.iter().map(|node| store.1.get(node).map_or(0, Records::len)).collect();
                assert_eq!(sizes.iter().sum::<usize>(), total, "case {case}, round {round}: keys got lost");
                assert!(
                    sizes.iter().all(|size| (least..=least + 1).contains(size)),
                    "case {case}: {sizes:?} of {total}"
                );
                assert_eq!(change(&mut store, &view), 0, "case {case}: the same view again");
                (0..numbers.below(20)).for_each(|number| put_at_owner(&mut store, &format!("{case} {round} {number}")));
            }
        }
    }

    #[test]
    fn a_fourth_node_takes_a_quarter() {
        let node = |number| format!("n{number}:1");
        let mut store: Store = (Table::first((1..=3).map(node).collect(), 1), BTreeMap::new());
        (0..100_001).for_each(|number| put_at_owner(&mut store, &number.to_string()));
        change(&mut store, &(1..=3).map(node).collect::<Vec<_>>());
        assert_eq!(change(&mut store, &(1..=4).map(node).collect::<Vec<_>>()), 25_000);
    }

    #[test]
    fn buckets_are_a_map_in_the_order_of_keys() {
        let mut numbers = Numbers(7);
        let (mut records, mut model) = (Records::default(), BTreeMap::new());
        for round in 0..60_000 {
            let key = numbers.below(40_000).to_string();
            let position = (hash_of(key.as_bytes()), key.clone().into_bytes());
            if numbers.below(3) > 0 {
                let value = round.to_string();
                let old = records.insert(position.0, Record::new(key.as_bytes(), &value));
                let before = model.insert(position, value);
                assert_eq!(old.map(|record| record.value().to_vec()), before.map(String::into_bytes));
            } else {
                assert_eq!(records.remove(position.0, key.as_bytes()).is_some(), model.remove(&position).is_some());
            }
        }
        assert_eq!(records.len(), model.len());
        for n in [1, 2, 100, model.len() / 2, model.len()] {
            assert_eq!(Some(&records.nth_highest(n, &[Span::all()])), model.keys().rev().nth(n - 1));
        }
        assert_eq!(records.nth_highest(model.len() + 1, &[Span::all()]), Position::default());
        let halves = Span::all().cut_at([1 << 62, 1 << 63].into_iter());
        let first_and_last = |place: &&Position| place.0 < 1 << 62 || place.0 >= 1 << 63;
        let nth = model.keys().rev().filter(first_and_last).nth(15_000);
        assert_eq!(Some(&records.nth_highest(15_001, &[halves[0].clone(), halves[2].clone()])), nth);
        for _ in 0..100 {
            let (one, other) = (numbers.below(usize::MAX) as u64, numbers.below(usize::MAX) as u64);
            let span = Span { from: (one.min(other), b"5".to_vec()), to: (one.max(other), Vec::new()) };
            let (given, to) = records.first_of(&span, numbers.below(100_000));
            let expected: Vec<_> = model.range(span.from.clone()..to.clone()).map(|(place, _)| place.clone()).collect();
            let mut places: Vec<Position> = given.iter().map(|it| (hash_of(it.key()), it.key().to_vec())).collect();
            places.sort();
            assert_eq!(places, expected);
            assert!(to > span.from && to <= span.to, "no progress");
            let spans = span.cut_at((1..20).map(|part| part << 59));
            let all = records.all_of(&spans, numbers.below(100_000));
            assert!(!all.is_empty());
            for (found, span) in all.iter().zip(&spans) {
                assert_eq!(found.len(), model.range(span.from.clone()..span.to.clone()).count());
            }
            let digests: Vec<u64> = records.digests_of(&spans);
            let digest = digests.iter().fold(0, |sum, digest| sum ^ digest);
            assert_eq!(vec![digest], records.digests_of(from_ref(&span)));
            assert_eq!(digests[0], records.digests_of(&spans[..1])[0]);
        }
        let all = Span::all();
        records.forget(&Span { to: (1 << 63, Vec::new()), ..all.clone() });
        assert_eq!(records.len(), model.range((1 << 63, Vec::new())..).count());
        records.forget(&all);
        assert_eq!(records.len(), 0);
    }

    #[test]
    fn keys_with_the_same_hash_are_told_apart() {
        let range = |from, shard| Range { from, shard, sources: Vec::new() };
        let mut table = Table::first(vec!["a:1".into(), "b:1".into()], 1);
        table.ranges = vec![range(Position::default(), 0), range((7, b"m".to_vec()), 1), range((8, Vec::new()), 0)];
        assert!(table.is_valid());
        assert_eq!((table.shard_at(7, b"l"), table.shard_at(7, b"m"), table.shard_at(8, b"")), (0, 1, 0));
    }

    /// A node that goes by a table of two nodes, and a table that could follow.
    fn node_and_next_table() -> (Node, Table) {
        let view = vec!["a:1".to_owned(), "b:1".to_owned()];
        let mut node = Node::new("a:1".into(), view.clone(), 1, 1, Duration::ZERO);
        let blank = Node::new("b:1".into(), view.clone(), 1, 2, Duration::ZERO).status();
        for _ in 0..5 {
            node.begin_round();
            let answers = [("b:1".to_owned(), Status { rounds: 5, ..blank.clone() })].into();
            node.let_in(&[], &answers);
        }
        let table = node.table().expect("both agree on the first table");
        let version = Version { epoch: 0, number: 1, coordinator: 2 };
        let change = Change::new(&table, &["b:1".to_owned()], 1);
        (node, table.next(version, &change, &[], &[], true))
    }

    fn tell(node: &mut Node, table: &Table) -> Option<Version> {
        let other = Node::new("b:1".into(), Vec::new(), 1, 2, Duration::ZERO);
        node.hear("b:1", Status { version: Some(table.version), table: Some(table.clone()), ..other.status() }, true);
        node.version()
    }

    #[test]
    fn a_table_from_outside_that_is_none_is_not_adopted() {
        let (mut node, table) = node_and_next_table();
        let before = node.version();
        let named = |name: &str| vec![name.to_owned()];
        let mut with = |spoil: &dyn Fn(&mut Table)| {
            let mut spoiled = table.clone();
            spoil(&mut spoiled);
            assert_eq!(tell(&mut node, &spoiled), before, "{spoiled:?}");
        };
        with(&|table| table.view = named("no address"));
        with(&|table| table.view = (0..33_000).map(|number| format!("n{number}:1")).collect());
        with(&|table| table.view = vec!["b:1".into(), "b:1".into()]);
        with(&|table| table.view = Vec::new());
        with(&|table| table.shards = Vec::new());
        with(&|table| table.shards = vec![vec![7]]);
        with(&|table| table.shards = vec![Vec::new()]);
        with(&|table| table.ranges = Vec::new());
        with(&|table| table.ranges[0].from.0 = 1);
        with(&|table| table.ranges[0].shard = 7);
        with(&|table| table.ranges[0].sources = vec![named("no address")]);
        with(&|table| table.ranges = vec![table.ranges[0].clone(); 200_000]);
        with(&|table| table.version.number = u64::MAX);
        with(&|table| table.version.number = 0);
        assert_eq!(tell(&mut node, &table), Some(table.version), "one that is whole is adopted");
    }

    #[test]
    fn a_table_at_the_wrong_time_is_not_adopted() {
        let (mut node, table) = node_and_next_table();
        let before = node.version();
        // A lock of a later epoch has been granted: its coordinator counts on what this node told it.
        let lock = Message::Lock(Version { epoch: 1, number: 9, coordinator: 3 }, vec!["a:1".into()], Vec::new());
        let other = Node::new("b:1".into(), Vec::new(), 1, 3, Duration::ZERO);
        assert!(matches!(node.receive(other.compose("a:1", lock)), (_, Reply::Done)));
        assert_eq!(tell(&mut node, &table), before);
    }

    #[test]
    fn a_replica_that_has_not_fetched_yet_goes_on_fetching_by_the_next_table() {
        let view: Vec<String> = vec!["a:1".into(), "b:1".into()];
        let mut node = Node::new("a:1".into(), view.clone(), 2, 1, Duration::ZERO);
        let first = Table::first(view.clone(), 2);
        // It starts blank beside a replica that goes by the first table.
        let other = Node::new("b:1".into(), view.clone(), 2, 2, Duration::ZERO);
        let goes_by_it = Status { version: Some(first.version), table: Some(first.clone()), ..other.status() };
        node.hear("b:1", goes_by_it.clone(), true);
        node.let_in(&[], &BTreeMap::from([("b:1".to_owned(), goes_by_it)]));
        assert!(matches!(node.place_by_table(0, b""), Place::Incoming(source, ..) if source == "b:1"));
        // A lock is resolved: the same table, under another version.
        let version = Version { number: 1, ..first.version };
        let next = first.next(version, &Change::new(&first, &view, 2), &[], &[], false);
        assert_eq!(tell(&mut node, &next), Some(version));
        assert!(matches!(node.place_by_table(0, b""), Place::Incoming(source, ..) if source == "b:1"));
    }

    #[test]
    fn records_that_do_not_fit_into_a_message_are_given_in_parts() {
        let (mut node, _) = node_and_next_table();
        let version = node.version().unwrap_or_default();
        let other = Node::new("b:1".into(), Vec::new(), 1, 2, Duration::ZERO);
        for key in (0..40).map(|number: u32| number.to_string()) {
            let value = format!("\"{}\"", "v".repeat(200_000));
            node.records.insert(hash_of(key.as_bytes()), Record::new(key.as_bytes(), &value));
        }
        let (mut left, mut keys) = (Span::all(), BTreeSet::new());
        while left.from < left.to {
            let message = Message::GiveAll(version, vec![left.clone()], false);
            let (_, Reply::All(copies, count, to)) = node.receive(other.compose("a:1", message)) else {
                panic!("it goes by that table");
            };
            assert!(copies.len() < 5 && (count == 1 || to > left.from), "too much, or no progress");
            keys.extend(copies.iter().filter_map(record_of_copy).map(|(record, _)| record.key().to_vec()));
            left.from = if count == 1 { left.to.clone() } else { to };
        }
        assert_eq!(keys.len(), 40);
    }

    /// A main instance in this process, where clients can be written that a shell cannot be: it starts them too slowly, and closes
    /// both directions of a connection at once.
    static SERVED: LazyLock<SocketAddr> = LazyLock::new(|| {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).unwrap();
        start_worker();
        Server.start(free).unwrap();
        repeat(STUCK / 4, watch_connections);
        repeat(Duration::ZERO, wake_sleepers);
        free
    });

    fn client() -> TcpStream {
        let client = TcpStream::connect(*SERVED).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    fn get(key: &str) -> String {
        format!("GET /kv-store/{key} HTTP/1.1\r\nHost: a\r\n\r\n")
    }

    /// The head of a PUT whose body has this length.
    fn put_head(key: &str, length: usize) -> String {
        format!("PUT /kv-store/{key} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n")
    }

    /// How many answers end in some bytes: there is a brace at each end of a body, and nowhere else in these.
    fn ends(bytes: &[u8]) -> usize {
        bytes.iter().filter(|byte| **byte == b'}').count()
    }

    /// Whoever wakes them could wait for one of them that waits for the list of them all (`Waiting`).
    #[test]
    fn coroutines_that_sleep_wake_up() {
        LazyLock::force(&SERVED);
        // Threads that keep the cores busy, so that others are held up in the middle of what they do.
        static IS_OVER: AtomicBool = AtomicBool::new(false);
        for _ in 0..4 {
            thread::spawn(|| {
                while !IS_OVER.load(SeqCst) {
                    std::hint::spin_loop()
                }
            });
        }
        let (sender, receiver) = mpsc::channel();
        for _ in 0..20 {
            let sender = sender.clone();
            may::go!(move || for _ in 0..100 {
                (0..100).for_each(|_| pause(Duration::ZERO));
                let _ = sender.send(());
            });
        }
        drop(sender);
        // However slow the machine is, one of them gets on within a minute.
        let wakes = (0..20 * 100).take_while(|_| receiver.recv_timeout(Duration::from_secs(60)).is_ok()).count();
        IS_OVER.store(true, SeqCst);
        assert_eq!(wakes, 20 * 100);
    }

    #[test]
    fn lines_stay_in_the_order_in_which_they_came_about() {
        let (reader, writer) = io::pipe().unwrap();
        STDERR.get_or_init(|| File::from(OwnedFd::from(writer)));
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let add_line = |node: &mut Node| node.lines.push(format!("line {}", COUNT.fetch_add(1, SeqCst)));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..250).for_each(|_| Live.with(add_line)));
            }
        });
        let lines =
            BufReader::new(reader).lines().map(Result::unwrap).filter(|line| line.starts_with("kv-store: line"));
        for (number, line) in lines.take(1000).enumerate() {
            assert_eq!(line, format!("kv-store: line {number}"));
        }
    }

    #[test]
    fn requests_that_come_with_the_end_of_the_stream_are_answered() {
        let cut = put_head("none", 50) + "val=";
        for round in 0..300 {
            let (mut client, mut answers) = (client(), String::new());
            let last = if round % 3 == 0 { &cut } else { "" };
            client.write_all((get("none").repeat(1 + round % 4) + last).as_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client.read_to_string(&mut answers).unwrap();
            assert_eq!(answers.matches("HTTP/1.1 404").count(), 1 + round % 4, "round {round}: {answers}");
        }
    }

    #[test]
    fn an_answer_does_not_wait_for_the_next_body() {
        let mut client = client();
        let mut buffer = [0; 1024];
        let mut read = |client: &mut TcpStream| {
            let count = client.read(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..count]).into_owned()
        };
        for round in 0..3 {
            client.write_all(get("none").as_bytes()).unwrap();
            client.write_all(put_head(&format!("late{round}"), 5).as_bytes()).unwrap();
            let answer = read(&mut client);
            assert!(answer.starts_with("HTTP/1.1 404 ") && answer.ends_with("}\n"), "{answer}");
            client.write_all(b"val=1").unwrap();
            let answer = read(&mut client);
            assert!(answer.starts_with("HTTP/1.1 201 ") && answer.ends_with("}\n"), "{answer}");
        }
    }

    #[test]
    fn large_answers_do_not_wait_for_the_next_body() {
        let (mut client, mut buffer, mut answers) = (client(), vec![0; 1 << 16], 0);
        let mut read_answers = |client: &mut TcpStream, expected| {
            while answers < expected {
                let count = client.read(&mut buffer).unwrap();
                assert!(count > 0, "{answers} answers");
                answers += ends(&buffer[..count]);
            }
        };
        let value = "v".repeat(MAX_VALUE);
        client.write_all((put_head("wide", MAX_VALUE + 4) + "val=" + &value).as_bytes()).unwrap();
        read_answers(&mut client, 1);
        // More than the kernel takes; and a body that comes when all of it was read.
        client.write_all((get("wide").repeat(8) + &get("none") + &put_head("wide", 5) + "val=").as_bytes()).unwrap();
        read_answers(&mut client, 10);
        client.write_all(b"1").unwrap();
        read_answers(&mut client, 11);
    }

    #[test]
    fn what_comes_with_the_end_of_the_stream_and_is_no_request_is_refused() {
        let unparsed = "Bad request: not HTTP/1.1, or more than 16 headers";
        for (sent, refusal) in [("GET /kv-store/none HT", "Bad request"), ("hello\r\n\r\n", unparsed)] {
            let (mut client, mut answer) = (client(), String::new());
            client.write_all(sent.as_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(&format!("{refusal}\"")), "{answer}");
        }
    }

    /// More answers than may be unread at once, for clients that ask for several and then rest a moment: none waits for another for
    /// ever, and none is taken for one that never reads.
    #[test]
    fn a_crowd_that_reads_late_gets_whole_answers() {
        let (mut first, value) = (client(), "v".repeat(MAX_VALUE));
        first.write_all((put_head("crowd", MAX_VALUE + 4) + "val=" + &value).as_bytes()).unwrap();
        assert!(first.read(&mut [0; 512]).unwrap() > 0);
        let mut crowd: Vec<TcpStream> = (0..100).map(|_| client()).collect();
        // They have been there for longer than it takes to be closed for reading nothing.
        thread::sleep(STUCK + STUCK / 5);
        for client in &mut crowd {
            client.write_all(get("crowd").repeat(4).as_bytes()).unwrap();
        }
        thread::sleep(STUCK / 2);
        let read = |mut client: TcpStream| {
            let (mut whole, mut last, mut buffer) = (0, 0, vec![0; 1 << 16]);
            while whole < 4
                && let Ok(count @ 1..) = client.read(&mut buffer)
            {
                whole += ends(&buffer[..count]);
                last = buffer[count - 1];
            }
            (whole, last)
        };
        let readers: Vec<_> = crowd.into_iter().map(|client| thread::spawn(move || read(client))).collect();
        for reader in readers {
            let (whole, last) = reader.join().unwrap();
            assert!(whole >= 1 && last == b'\n', "{whole} whole answers, the last byte is {last}");
        }
    }

    #[test]
    fn the_hash_is_the_published_one() {
        // The first test vector of the authors' reference code is for a key of 00 to 0f; these are for one of zeros.
        assert_eq!(hash_of(b""), 0x1e924b9d737700d7);
        let shares = (0..30_000).fold([0; 3], |mut shares, number: u32| {
            let view = (0..3).map(|number| format!("n{number}:1")).collect();
            shares[Table::first(view, 1).shard_at(hash_of(number.to_string().as_bytes()), b"")] += 1;
            shares
        });
        assert!(shares.iter().all(|share| (9_700..10_300).contains(share)), "{shares:?}");
    }

    #[test]
    fn settings_name_what_is_wrong() {
        let read = |text: &str| {
            let variables: HashMap<_, _> =
                text.split_whitespace().filter_map(|setting| setting.split_once('=')).collect();
            Settings::read(|name| variables.get(name).map(|value| value.to_string()))
        };
        let wrong = ["PORT=abc", "PORT=0", "PORT=65536", "PORT=+1", "IP=localhost", "FORWARDING_ADDRESS=nohost"];
        let wrong_too =
            ["MAINIP=a:b", "ADDRESS=[::1:80", "VIEW=a:1", "ADDRESS=a:1 VIEW=a:1,a:1", "ADDRESS=a:1 VIEW=a:1,b"];
        for setting in wrong.into_iter().chain(wrong_too).chain(["ADDRESS=a:1 FORWARDING_ADDRESS=b:1 VIEW=a:1"]) {
            assert!(read(setting).is_err(), "{setting}");
        }
        for (setting, listen) in [
            ("", "0.0.0.0:8080"),
            ("PORT= IP=", "0.0.0.0:8080"),
            ("PORT=9 IP=::1", "[::1]:9"),
            ("ADDRESS=n:99", "0.0.0.0:99"),
            ("ADDRESS=n:99 PORT=5 VIEW=a:1,n:99", "0.0.0.0:5"),
            ("FORWARDING_ADDRESS=[::1]:80", "0.0.0.0:8080"),
        ] {
            assert_eq!(read(setting).map(|settings| settings.listen.to_string()), Ok(listen.to_string()), "{setting}");
        }
    }
}

//! kv-store: a distributed key-value store over HTTP, in one file.
//!
//! Whatever the role of an instance, a request travels one road:
//!
//! ```text
//! bytes -> Request -> route -> who owns it? -- this instance -> store -> Outcome -> Answer -> bytes
//!                                         \--- a peer -> relay -> the peer's Answer, unchanged --/
//! ```
//!
//! A main instance owns every key; a follower owns none and relays to its main instance; a node owns the keys that its table
//! gives it. An `Outcome` (created, found, missing, refused because ...) knows nothing of HTTP; the contract's two
//! vocabularies are two columns of one table, `Outcome::row`. The sections below follow the road: settings, requests,
//! outcomes, the store, owners, shards, membership, the relay, view changes, and last the connections, where bytes come from
//! and go to.
//!
//! may's workers run each connection as a coroutine and must never block. What blocks has threads of its own: the lanes of
//! the relay (the HTTP client blocks; a coroutine that waits for a lane holds no worker), the watches over connections and
//! over the relay's lines, and in a node the two that keep in touch with the others and end view changes that were abandoned.

use std::borrow::{Borrow, Cow};
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
use std::io::{self, BufRead, Read, Write};
use std::mem::ManuallyDrop;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::process::exit;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use attohttpc::{ErrorKind, Method, ProxySettings, RequestBuilder, StatusCode};
use httpdate::HttpDate;
use may::sync::Blocker;
use may_minihttp::{BodyReader, HttpService, HttpServiceFactory, Request as Parsed, Response};
use percent_encoding::percent_decode;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use serde_json::value::RawValue;
use siphasher::sip::SipHasher24;
use url::{Position as Part, Url};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The limit of a value, in bytes: of a string its UTF-8, of anything else its JSON text (the contract, "Size limit").
const MAX_VALUE: usize = 1 << 20;
/// The limit of a body: a value at its limit fits in however it is escaped (JSON's \u0041 takes 6 bytes for 1).
const MAX_BODY: usize = 8 << 20;
/// The limit of an exchange's body, in which a request with all that leads to it travels.
const MAX_EXCHANGE: usize = MAX_BODY + 2 * MAX_HEAD;
/// The limit of a request's head. The server has none of its own and would collect an endless head in memory.
const MAX_HEAD: usize = 64 << 10;
/// The answers that a connection may have waiting for a client that does not read them, in bytes.
const MAX_UNSENT: u64 = 4 << 20;
/// A connection on which nothing happens for this long is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Locks a mutex, also after a panic elsewhere: what is guarded here is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- Settings: what the environment says ----------------------------------------------------------------------------

const HELP: &str = "\
kv-store: a distributed key-value store over HTTP

usage: kv-store [--help | --version | --health]
  --health  asks the instance that the same environment describes whether it answers; exit status 0 or 1

environment (an empty variable is an unset one):
  PORT                TCP port to listen on                        [the port of ADDRESS, else 8080]
  IP                  IPv4 or IPv6 address to bind                 [0.0.0.0]
  FORWARDING_ADDRESS  host:port of the main instance to relay to   [none: this is a main instance]
  MAINIP              the same, where FORWARDING_ADDRESS is unset
  ADDRESS             this node's own host:port, as others reach it   [none]
  VIEW                the nodes of the store, host:port,host:port,... [ADDRESS alone if that is set]
";

/// What the environment asks of this process.
struct Settings {
    listen: SocketAddr,
    role: Role,
    /// The first view of a node.
    view: Vec<String>,
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
        let role = main.map(Role::Follower).or(own.map(Role::Node)).unwrap_or(Role::Main);
        Ok(Settings { listen: SocketAddr::new(ip, port), role, view })
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

/// The port of `host:port`, where the host is a name, an IPv4 address or an IPv6 address in brackets: what stands unchanged
/// in a URL, and nothing else.
fn port_of(text: &str) -> Option<u16> {
    let url = Url::parse(&format!("http://{text}")).ok()?;
    let (host, port) = (url.host_str()?, url.port_or_known_default().filter(|port| *port > 0)?);
    // The parser takes more characters, such as a quotation mark, than may stand in an answer.
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte));
    (plain && text.eq_ignore_ascii_case(&format!("{host}:{port}"))).then_some(port)
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

/// What a request is between instances, where it travels in an exchange (see the relay).
#[derive(Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
enum Origin {
    /// A client's request, relayed or not.
    #[default]
    Client,
    /// A client's request that a node sends to the one that owns the key by its table.
    Node,
    /// No client's request: the body is a message of one node to another (see view changes).
    Message,
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
    if lengths.any(|another| another != Some(length)) || size + target.len() > MAX_HEAD {
        return Err(Outcome::BadRequest);
    }
    let connection = joined("Connection").to_ascii_lowercase();
    let framing = Framing {
        length,
        is_head: verb == "HEAD",
        closing: parsed.version() == 0 || connection.split(',').any(|option| option.trim() == "close"),
        expects_continue: parsed.version() == 1 && length > 0 && joined("Expect").eq_ignore_ascii_case("100-continue"),
    };
    // In absolute form, scheme and host stand before the path (RFC 9112 section 3.2.2). Whatever else does not begin with a
    // slash (OPTIONS *, CONNECT host:port) is a path that does not exist.
    let target = match (!target.starts_with('/')).then(|| target.split_once("://")).flatten() {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    let (verb, target) = (if framing.is_head { "GET" } else { verb }.into(), target.into());
    let (content_type, via) = (joined("Content-Type"), joined("Via"));
    let request = Request { verb, target, content_type, via, ..Request::default() };
    let most = if request.is_exchange() { MAX_EXCHANGE } else { MAX_BODY };
    let oversized = length > most && !request.ignores_body();
    Ok((Request { oversized, ..request }, framing))
}

#[derive(Clone, Copy)]
enum Vocabulary {
    Form,
    Json,
}

/// What a path names.
enum Resource<'a> {
    Instance,
    KeyCount,
    ViewChange,
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
            [Some(b""), Some(b"kv-store"), None | Some(b""), None, _] => (Resource::Instance, Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(b"key-count"), None, _] => (Resource::KeyCount, Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(b"view-change"), None, _] => (Resource::ViewChange, Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(b"keys"), Some(segment), None] => (key(segment), Vocabulary::Json),
            [Some(b""), Some(b"kv-store"), Some(segment), None, _] => (key(segment), typed),
            _ => (Resource::Unknown, typed),
        }
    }

    fn ignores_body(&self) -> bool {
        !matches!(self.verb.as_str(), "PUT" | "POST")
    }
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
    match member(body, "value")? {
        "null" => Err(Outcome::ValueMissing),
        json if json.starts_with('"') => {
            json_of(&serde_json::from_str::<String>(json).map_err(|_| Outcome::BodyNotObject)?)
        }
        json if json.len() > MAX_VALUE => Err(Outcome::ValueTooLarge),
        json => Ok(json.to_owned()),
    }
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

/// The JSON text of a member of the JSON object that a body is: `null` if there is no such member, or no body.
fn member<'a>(body: &'a [u8], name: &str) -> Result<&'a str, Outcome> {
    let body = if body.is_empty() { b"{}" } else { body };
    let members: HashMap<String, &RawValue> = serde_json::from_slice(body).map_err(|_| Outcome::BodyNotObject)?;
    Ok(members.get(name).map_or("null", |value| value.get()))
}

// ---- Outcomes, and how the two vocabularies say them ----------------------------------------------------------------

/// What became of a request, before anyone thinks of HTTP.
#[rustfmt::skip]
enum Outcome {
    Created, Replaced, Found(Record), Deleted, Missing,
    KeyInvalid, ValueMissing, ValueTooLarge, ValueNotText, BodyNotObject,
    MainDown, NotFound, BadRequest, LengthRequired, AddressNotSet, ViewMissing, ChangeUnderWay, Elsewhere, Held,
    /// With the header that tells which verbs the path takes.
    VerbNotAllowed(&'static str),
    KeyCount(usize),
    /// With the members that describe this instance.
    Instance(String),
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
            ValueNotText      => [(403, "Value is not valid UTF-8"); 2],
            BodyNotObject     => [(400, "Body is not a JSON object"); 2],
            MainDown          => [(501, "Server unavailable"),   (503, "Main instance is down")],
            NotFound          => [(404, "Not found"); 2],
            VerbNotAllowed(_) => [(405, "Method not allowed"); 2],
            BadRequest        => [(400, "Bad request"); 2],
            LengthRequired    => [(411, "Length required"); 2],
            KeyCount(_)       => [(200, r#"{"message":"Key count retrieved successfully","key-count":<count>}"#); 2],
            Instance(_)       => [(200, r#"{"result":"Success",<instance>}"#); 2],
            AddressNotSet     => [(400, "ADDRESS is not set"); 2],
            NodeDown(_)       => [(501, "Server unavailable"),   (503, "Node <node> is down")],
            ViewMissing       => [(400, "View is missing"); 2],
            ViewInvalid(_)    => [(400, "View is not valid: <reason>"); 2],
            ChangeUnderWay    => [(409, "Another view change is in progress"); 2],
            HoldsKeys(_)      => [(409, "Node <node> holds keys of another store"); 2],
            ViewChanged(_)    => [(200, r#"{"message":"View change successful",<shards>}"#); 2],
            // Only between nodes: the owner is another one by now, or none until a view change is over.
            Elsewhere         => [(421, "Not the owner"); 2],
            Held              => [(423, "A view change is under way"); 2],
        }
    }

    /// Says the outcome in a vocabulary.
    fn answer(&self, vocabulary: Vocabulary, verb: &str) -> Answer {
        let (status, text) = self.row()[vocabulary as usize];
        let template = match vocabulary {
            _ if text.starts_with('{') => Cow::Borrowed(text),
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
                (Outcome::KeyCount(count), _) => body.extend(count.to_string().as_bytes()),
                (Outcome::Instance(text) | Outcome::NodeDown(text) | Outcome::HoldsKeys(text), _)
                | (Outcome::ViewInvalid(text) | Outcome::ViewChanged(text), _) => body.extend(text.as_bytes()),
                _ => {}
            }
        }
        body.push(b'\n');
        let header = if let Outcome::VerbNotAllowed(header) = self { header } else { JSON };
        Answer { status, header: Cow::Borrowed(header), body }
    }
}

/// The headers that our answers have, beside those that every answer has.
const JSON: &str = "Content-Type: application/json";
const EXCHANGE: &str = "Content-Type: application/x-kv-store-exchange";
const EXCHANGE_TYPE: &str = EXCHANGE.split_at("Content-Type: ".len()).1;
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
    /// The status as HTTP spells it out.
    fn reason(&self) -> &'static str {
        StatusCode::from_u16(self.status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Unknown")
    }

    /// Writes what may_minihttp writes of an answer, byte for byte as long.
    fn write(&self, out: &mut Vec<u8>, connection: &str, without_body: bool) {
        let (status, reason, length, header) = (self.status, self.reason(), self.body.len(), &self.header);
        let date = HttpDate::from(SystemTime::now());
        let _ = write!(out, "HTTP/1.1 {status} {reason}\r\nServer: M\r\nDate: {date}\r\nContent-Length: {length}\r\n");
        let _ = write!(out, "{header}\r\n{connection}\r\n");
        out.extend(if without_body { &[] } else { &self.body[..] });
    }

    /// How many bytes `write` writes, where nothing is said of the connection.
    fn length(&self) -> usize {
        const REST: &str =
            "HTTP/1.1 200 \r\nServer: M\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 0\r\n\r\n\r\n";
        let more_digits = self.body.len().checked_ilog10().unwrap_or(0) as usize;
        REST.len() + self.reason().len() + more_digits + self.header.len() + self.body.len()
    }

    /// What instances say to one another, as bytes.
    fn exchange(status: u16, content: &impl Serialize) -> Answer {
        // Writing to a Vec cannot fail.
        Answer { status, header: EXCHANGE.into(), body: postcard::to_stdvec(content).unwrap_or_default() }
    }

    /// Adds which node answered, where there is a place for it.
    fn with_address(mut self, node: &str, vocabulary: Vocabulary) -> Answer {
        if matches!(vocabulary, Vocabulary::Json) && self.body.ends_with(b"}\n") {
            self.body.truncate(self.body.len() - 2);
            let _ = writeln!(self.body, r#","address":"{node}"}}"#);
        }
        self
    }
}

/// Borrows the header of a peer's answer if it is one of ours: the server takes no others.
fn known_header(header: &str) -> Cow<'static, str> {
    let known = [JSON, EXCHANGE, GET_ONLY, PUT_ONLY, KEY_VERBS].into_iter().find(|known| *known == header);
    known.map_or_else(|| Cow::Owned(header.to_owned()), Cow::Borrowed)
}

// ---- The store: one map behind one lock -----------------------------------------------------------------------------

/// A key and its value in one allocation: a byte with the key's length, the key, and the value as JSON text, as it goes back.
/// Cloning one copies a pointer, so that an answer is made of it after the lock on the map is gone.
#[derive(Clone)]
struct Record(Arc<[u8]>);

impl Record {
    /// The key must be valid, which keeps it to 200 bytes in either vocabulary.
    fn new(key: &[u8], value: &str) -> Record {
        Record([&[key.len() as u8], key, value.as_bytes()].concat().into())
    }

    /// A record as it travels between nodes, if that is what it is.
    fn from_bytes(bytes: &[u8]) -> Option<Record> {
        let value = bytes.get(1 + *bytes.first()? as usize..)?;
        serde_json::from_slice::<&RawValue>(value).is_ok().then(|| Record(bytes.into()))
    }

    fn key(&self) -> &[u8] {
        &self.0[1..1 + self.0[0] as usize]
    }

    fn value(&self) -> &[u8] {
        &self.0[1 + self.0[0] as usize..]
    }
}

// A set whose entries are found by their key is a map that keeps key and value together.
#[rustfmt::skip]
impl Borrow<[u8]> for Record { fn borrow(&self) -> &[u8] { self.key() } }
#[rustfmt::skip]
impl Hash for Record { fn hash<H: Hasher>(&self, state: &mut H) { self.key().hash(state) } }
#[rustfmt::skip]
impl PartialEq for Record { fn eq(&self, other: &Record) -> bool { self.key() == other.key() } }
impl Eq for Record {}

/// What this instance holds, and what it knows of the other nodes. A std Mutex and not a coroutine's: nobody waits for
/// anything while holding it.
static STORE: LazyLock<Mutex<Store>> = LazyLock::new(Default::default);

#[derive(Default)]
struct Store {
    records: HashSet<Record>,
    /// Says something in a node only.
    membership: Membership,
}

/// Does something with the record of a key; None if this instance does not own the key (any more).
fn on_key(key: &[u8], action: impl FnOnce(&mut HashSet<Record>) -> Outcome) -> Option<Outcome> {
    let mut store = lock(&STORE);
    matches!(store.membership.owner(key), Owner::ThisInstance).then(|| action(&mut store.records))
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

fn is_own(node: &str) -> bool {
    own() == Some(node)
}

/// Who owns what a request is about.
enum Owner {
    ThisInstance,
    /// The main instance of this follower, by its address.
    Main(&'static str),
    /// Another node, by its address.
    Node(String),
    /// Nobody knows right now: a view change is under way, or this node has not heard what the others' view is.
    Unsettled,
}

fn owner(resource: &Resource, verb: &str) -> Owner {
    match (&SETTINGS.role, resource) {
        // What an instance is, only that instance can say.
        (_, Resource::Instance) if verb == "GET" => Owner::ThisInstance,
        (Role::Follower(main), _) => Owner::Main(main),
        (Role::Node(_), Resource::Key(key)) => lock(&STORE).membership.owner(key),
        (Role::Node(_), Resource::KeyCount) if !lock(&STORE).membership.is_settled() => Owner::Unsettled,
        (Role::Node(_) | Role::Main, _) => Owner::ThisInstance,
    }
}

/// The whole road of a request, from its owner to its answer.
fn answer(request: Request) -> Answer {
    if request.origin == Origin::Message {
        return receive(&request.body);
    } else if request.is_exchange() {
        return answer_exchange(&request.body);
    }
    let (resource, vocabulary) = request.route();
    let outcome = match owner(&resource, &request.verb) {
        Owner::ThisInstance => perform(&resource, &request, vocabulary),
        Owner::Main(main) => {
            let verb = request.verb.clone();
            let down = || Outcome::MainDown.answer(vocabulary, &verb);
            return Peer::at(main).relay(request, PATIENCE).unwrap_or_else(down);
        }
        Owner::Node(_) | Owner::Unsettled => None,
    };
    match outcome {
        Some(outcome) => outcome.answer(vocabulary, &request.verb),
        None => find_owner(&resource, &request, vocabulary),
    }
}

/// In a node, takes a request to whoever owns its key, as soon as somebody does. (Not part of `answer`: inlined where every
/// request passes, it would cost each connection another page of its stack.)
#[inline(never)]
fn find_owner(resource: &Resource, request: &Request, vocabulary: Vocabulary) -> Answer {
    let arrived = Instant::now();
    let mut deadline = arrived + PATIENCE;
    let say = |outcome: Outcome| outcome.answer(vocabulary, &request.verb);
    let down = |node: String| say(Outcome::NodeDown(node.clone())).with_address(&node, vocabulary);
    loop {
        match owner(resource, &request.verb) {
            Owner::ThisInstance if let Some(outcome) = perform(resource, request, vocabulary) => return say(outcome),
            Owner::Node(node) if request.origin == Origin::Client => {
                // A request that was held has waited already.
                let patience = PATIENCE.saturating_sub(arrived.elapsed()).max(MESSAGE_LIMIT);
                match Peer::at(&node).relay(Request { origin: Origin::Node, ..request.clone() }, patience) {
                    Some(answer) if answer.status == 423 => deadline = Instant::now() + PATIENCE,
                    // Its table is not ours: one of us learns which is newer.
                    Some(answer) if answer.status == 421 => drop(meet(&node)),
                    Some(answer) => return answer.with_address(&node, vocabulary),
                    None => return down(node),
                }
            }
            _ => {}
        }
        // The owner changed, or is about to. A client's request waits here; a node looks at its own table again.
        let (under_way, missing) = lock(&STORE).membership.obstacle();
        if request.origin == Origin::Node {
            return say(if under_way { Outcome::Held } else { Outcome::Elsewhere });
        } else if under_way {
            deadline = Instant::now() + PATIENCE;
        } else if Instant::now() > deadline {
            return down(missing);
        }
        may::coroutine::sleep(Duration::from_millis(5));
    }
}

/// Does what a request asks of the instance that owns its key; None if that is not (any more) this one.
fn perform(resource: &Resource, request: &Request, vocabulary: Vocabulary) -> Option<Outcome> {
    use Outcome::*;
    Some(match (resource, request.verb.as_str()) {
        (Resource::Key(key), "GET") => on_key(key, |records| records.get(&key[..]).cloned().map_or(Missing, Found))?,
        (Resource::Key(key), "DELETE") => on_key(key, |records| records.take(&key[..]).map_or(Missing, |_| Deleted))?,
        (Resource::Key(key), "PUT") => match record_of(key, request, vocabulary) {
            Ok(record) => on_key(key, |records| records.replace(record).map_or(Created, |_| Replaced))?,
            Err(refusal) => refusal,
        },
        (Resource::KeyCount, "GET") => KeyCount(lock(&STORE).records.len()),
        (Resource::ViewChange, "PUT") => change_view(&request.body).unwrap_or_else(|failure| failure),
        (Resource::Instance, "GET") => Instance(describe_instance()),
        (Resource::Key(_), _) => VerbNotAllowed(KEY_VERBS),
        (Resource::KeyCount | Resource::Instance, _) => VerbNotAllowed(GET_ONLY),
        (Resource::ViewChange, _) => VerbNotAllowed(PUT_ONLY),
        (Resource::Unknown, _) => NotFound,
    })
}

fn describe_instance() -> String {
    let store = lock(&STORE);
    let (count, view) = (store.records.len(), store.membership.table.view.join(r#"",""#));
    let (role, more) = match &SETTINGS.role {
        Role::Main => ("main", format!(r#""key-count":{count}"#)),
        Role::Follower(main) => ("follower", format!(r#""forwarding-address":"{main}""#)),
        Role::Node(own) => ("node", format!(r#""address":"{own}","view":["{view}"],"key-count":{count}"#)),
    };
    format!(r#""role":"{role}","version":"{VERSION}",{more}"#)
}

// ---- Shards: which node owns which key ------------------------------------------------------------------------------
//
// Keys have an order: by hash, and where two have the same, by the key itself. A table cuts that order into ranges and says
// which node of the view owns which. Every node has the table, and a version tells an old one from a new one.

/// A place in the order of keys.
type Position = (u64, Vec<u8>);

/// SipHash-2-4 with a key of zeros (Aumasson and Bernstein, 2012).
fn hash_of(key: &[u8]) -> u64 {
    SipHasher24::new().hash(key)
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Table {
    version: u64,
    /// The view change that made this table; 0 is none.
    change: u64,
    view: Vec<String>,
    /// Where each range begins, and which node of the view owns it, by its index.
    ranges: Vec<(Position, usize)>,
}

impl Table {
    /// The table of a store that had no view change: as much of the hash space for each node.
    fn first(view: Vec<String>) -> Table {
        let share = |index| ((index as u128 * (1 << 64) / view.len() as u128) as u64, Vec::new());
        Table { ranges: (0..view.len()).map(|index| (share(index), index)).collect(), view, ..Table::default() }
    }

    /// The index of the owner of a place. The table must be whole.
    fn index_of(&self, hash: u64, key: &[u8]) -> usize {
        self.ranges[self.ranges.partition_point(|((first, least), _)| (*first, &least[..]) <= (hash, key)) - 1].1
    }

    fn owner(&self, key: &[u8]) -> &str {
        &self.view[self.index_of(hash_of(key), key)]
    }

    /// Whether every place has an owner.
    fn is_whole(&self) -> bool {
        self.ranges.first().is_some_and(|(first, _)| *first == Position::default())
            && self.ranges.is_sorted_by(|(one, _), (next, _)| one < next)
            && self.ranges.iter().all(|(_, index)| *index < self.view.len())
            && self.version < u64::MAX / 2
    }

    /// The table after a view change in which nodes give up what is above their cuts: the place and the receiver, from the
    /// highest place down. Ranges left to a node that leaves hold no keys; they are dealt out among the view.
    fn after(&self, view: &[String], cuts: &[(String, Position, String)]) -> Table {
        let mut places: Vec<&Position> = self.ranges.iter().map(|(first, _)| first).collect();
        places.extend(cuts.iter().map(|(_, place, _)| place));
        places.sort();
        places.dedup();
        let range = |(number, place): (usize, &Position)| {
            let old = &self.view[self.index_of(place.0, &place.1)];
            let cut = cuts.iter().find(|(giver, cut, _)| giver == old && cut <= place);
            let owner = cut.map_or(old, |(.., receiver)| receiver);
            (place.clone(), view.iter().position(|node| node == owner).unwrap_or(number % view.len()))
        };
        let mut ranges: Vec<(Position, usize)> = places.into_iter().enumerate().map(range).collect();
        ranges.dedup_by_key(|(_, index)| *index);
        Table { view: view.to_vec(), ranges, ..Table::default() }
    }
}

/// Who gives how many keys to whom so that the shards of the view differ by one key at most, and no key moves without need.
/// Counts are those of all nodes of the old and the new view; one that is not in the new view gives all it has. Afterwards
/// they are what each node has then.
fn plan(counts: &mut BTreeMap<String, usize>, view: &[String]) -> Vec<(String, String, usize)> {
    let total: usize = counts.values().sum();
    let mut largest_first = view.to_vec();
    largest_first.sort_by_key(|node| Reverse(counts[node]));
    // The nodes with most keys take the remainder: that saves them a move.
    let target = |rank| total / view.len() + usize::from(rank < total % view.len());
    let targets: HashMap<String, usize> = largest_first.into_iter().zip((0..).map(target)).collect();
    let mut moves = Vec::new();
    for giver in counts.keys().cloned().collect::<Vec<_>>() {
        for receiver in view {
            let surplus = counts[&giver].saturating_sub(targets.get(&giver).copied().unwrap_or(0));
            let moving = surplus.min(targets[receiver].saturating_sub(counts[receiver]));
            if moving > 0 {
                counts.entry(giver.clone()).and_modify(|count| *count -= moving);
                counts.entry(receiver.clone()).and_modify(|count| *count += moving);
                moves.push((giver.clone(), receiver.clone(), moving));
            }
        }
    }
    moves
}

// ---- Membership: which table a node goes by -------------------------------------------------------------------------
//
// A node answers for a key only by a table that the others go by as well. So the nodes meet several times a second: two that
// meet tell one another their tables, and one of them gives in where they differ. A node that met nobody for a while may have
// slept through a change of the table, and holds its requests until it has asked.

/// A node that has not asked the others for this long does not rely on its table.
const FRESH: Duration = Duration::from_secs(2);
/// The nodes are met side by side, so this is how long a round takes at most; two must fit into FRESH.
const MEET_LIMIT: Duration = Duration::from_millis(700);

/// When this node began to keep in touch, which is when this is looked at first.
static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What a node knows of the store it belongs to.
#[derive(Default)]
struct Membership {
    table: Table,
    /// All nodes of the view were heard to have this table: before that, nobody answers for a key.
    agreed: bool,
    /// When the others were last asked whether there is a newer table.
    confirmed: Option<Instant>,
    /// A node of the view that did not answer then.
    silent: Option<String>,
    /// The view change that this node is prepared for.
    change: Option<Change>,
    /// The copies of one that this node gave up, not knowing how it ended: should it have been committed, they count.
    orphans: Option<(u64, Vec<Record>)>,
}

impl Membership {
    fn owner(&self, key: &[u8]) -> Owner {
        match own() {
            Some(_) if !self.is_settled() => Owner::Unsettled,
            Some(own) if self.table.owner(key) != own => Owner::Node(self.table.owner(key).into()),
            _ => Owner::ThisInstance,
        }
    }

    /// Whether this node may answer by its table: no view change is under way, and none can have passed it by. (A node that
    /// was stopped and goes on asks first. Removing a node by force takes longer than this lets it rely on its table.)
    fn is_settled(&self) -> bool {
        self.change.is_none() && self.agreed && self.confirmed.is_some_and(|at| at.elapsed() < FRESH)
    }

    /// What keeps this node from answering: a view change, or a node that does not answer.
    fn obstacle(&self) -> (bool, String) {
        (self.change.is_some(), self.silent.as_ref().or(self.table.view.first()).cloned().unwrap_or_default())
    }

    /// The view change of this id, if this node is prepared for it: its coordinator is alive.
    fn prepared(&mut self, id: u64) -> Option<&mut Change> {
        let change = self.change.as_mut().filter(|change| change.id == id)?;
        change.renewed = Instant::now();
        Some(change)
    }

    /// Whether to give up this table for that of another node.
    fn gives_in(&self, sender: &str, theirs: &Table) -> bool {
        let ours = &self.table;
        let listed = theirs.view.iter().any(|node| is_own(node));
        let known = ours.view.iter().any(|node| node == sender);
        let smaller = (theirs.view.len(), &theirs.view) < (ours.view.len(), &ours.view);
        // While prepared, only for the one that the view change makes: any other would cost this node its copies.
        theirs.is_whole()
            && self.change.as_ref().is_none_or(|change| change.id == theirs.change)
            && match theirs.version.cmp(&ours.version) {
                Ordering::Greater => listed || known,
                // First views that differ: the node that the other does not list gives in, or else the larger view.
                Ordering::Equal => known && !self.agreed && theirs.view != ours.view && (!listed || smaller),
                Ordering::Less => false,
            }
    }
}

impl Store {
    /// Goes over to a table: what was staged for it counts from now on, and what others own by it goes.
    fn take_up(&mut self, table: Table) {
        let staged = self.membership.change.take().map(|change| (change.id, change.staged));
        let staged = [staged, self.membership.orphans.take()].into_iter().flatten();
        self.records.extend(staged.filter(|(id, _)| *id == table.change).flat_map(|(_, records)| records));
        self.records.retain(|record| is_own(table.owner(record.key())));
        self.records.shrink_to_fit();
        (self.membership.table, self.membership.agreed) = (table, true);
    }

    /// Takes up the table of another node if it is the better one.
    fn consider(&mut self, sender: &str, theirs: &Table) {
        if self.membership.gives_in(sender, theirs) {
            self.take_up(theirs.clone());
            self.membership.agreed = theirs.version > 0;
        }
    }
}

/// Tells a node this one's table and hears its own, and takes up the better one. Returns the node's, and whether all agree on it.
fn meet(node: &str) -> Option<(Table, bool)> {
    let table = lock(&STORE).membership.table.clone();
    let Reply::Table(theirs, agreed) = tell(node, 0, Message::Meet(own()?.into(), table))? else { return None };
    lock(&STORE).consider(node, &theirs);
    theirs.is_whole().then_some((theirs, agreed))
}

/// Asks nodes something side by side: one that does not answer does not hold up the others.
fn ask_all<T: Send>(nodes: Vec<String>, ask: impl Fn(&str) -> Option<T> + Sync) -> Vec<(String, Option<T>)> {
    let mut asked: Vec<(String, Option<T>)> = nodes.into_iter().map(|node| (node, None)).collect();
    may::coroutine::scope(|scope| {
        for (node, reply) in &mut asked {
            let ask = &ask;
            may::go!(scope, move || *reply = ask(node));
        }
    });
    asked
}

/// Meets the other nodes of the view.
fn keep_in_touch() {
    let (view, began) = (lock(&STORE).membership.table.view.clone(), Instant::now());
    let heard = ask_all(view.iter().filter(|node| !is_own(node)).cloned().collect(), meet);
    let mut store = lock(&STORE);
    let membership = &mut store.membership;
    let same = heard.iter().filter_map(|(_, reply)| reply.as_ref()).filter(|(table, _)| *table == membership.table);
    let agreements: Vec<bool> = same.map(|(_, agreed)| *agreed).collect();
    // A node alone waits for whoever may still count it in.
    let lonely = heard.is_empty() && membership.confirmed.is_none() && *STARTED + FRESH / 2 > began;
    membership.agreed |=
        (agreements.len() == heard.len() || agreements.contains(&true)) && membership.table.view == view;
    membership.silent = heard.into_iter().find(|(_, reply)| reply.is_none()).map(|(node, _)| node);
    membership.confirmed = if lonely { None } else { Some(began) };
}

// ---- The relay: taking a request to the instance that owns it -------------------------------------------------------
//
// attohttpc blocks, and opens a connection for each HTTP request. So what is to go to a peer stands in a line, and a lane (a
// thread) takes it out: one lane, as long as it comes back quickly. What arrives while it is out shares its next exchange: one
// POST with the requests in its body, whose answer has the answers. A lone request leaves at once, as itself. Requests share an
// exchange only on their way to who owns what they ask for: from node to node, and to a main instance, which says in its
// answers that it takes exchanges (Accept-Post). Any other peer (another server that speaks the contract, a follower) gets them
// one by one, on a lane each; what plain HTTP cannot carry goes in an exchange of its own.

/// A peer that is gone is reported within 1.5 s (the contract, "A follower"): a connection must come about before.
const CONNECT_LIMIT: Duration = Duration::from_millis(1200);
/// A peer that accepts and never answers is reported within 5 s. The lane gives up, and a moment later whoever waits.
const ANSWER_LIMIT: Duration = Duration::from_millis(4200);
const PATIENCE: Duration = Duration::from_millis(4400);
/// One slow exchange does not hold up those behind it: after one to two times this, another lane goes out beside it.
const OVERDUE: Duration = Duration::from_millis(5);
/// As many lanes may be out for one peer: a main instance of another kind that is slow gets so many requests at once.
const MAX_LANES: usize = 64;
/// How long a lane rests before it ends.
const REST: Duration = Duration::from_secs(1);
/// How long a lane that found the line empty looks again. To sleep and be woken takes longer, and as much of the processor.
const LOOKOUT: Duration = Duration::from_micros(150);
/// An exchange takes along this many requests, or requests with this many bytes of body; a larger one travels alone.
const GROUP_REQUESTS: usize = 128;
const GROUP_BYTES: usize = 256 << 10;
/// An answer to an exchange ends after this many bytes. Requests past that are not looked at, and go again.
const EXCHANGE_BYTES: usize = 1 << 20;
/// More is no answer to any request of the contract.
const MAX_ANSWER: u64 = 16 << 20;
/// What is said of a connection that does not come about.
const NO_WAY: [io::ErrorKind; 5] = [AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut];
/// For how long a name is taken to stand for the same address.
const LOOKUP_LIFETIME: Duration = Duration::from_secs(1);

/// This process, in the `Via` of what it relays: a request that comes back with it runs in a ring.
static VIA: LazyLock<String> = LazyLock::new(|| format!("1.1 kv-store-{:016x}", RandomState::new().hash_one(0)));

static PEERS: LazyLock<Mutex<HashMap<String, Arc<Peer>>>> = LazyLock::new(Default::default);

/// Another instance, and the requests that wait to be taken to it.
#[derive(Default)]
struct Peer {
    /// Its `host:port`.
    address: String,
    line: Mutex<Line>,
    /// Wakes a lane that rests.
    wake: Condvar,
    /// What the name in the address last stood for.
    lookup: Mutex<Option<(Instant, Option<String>)>>,
}

#[derive(Default)]
struct Line {
    waiting: VecDeque<Errand>,
    /// Some wait that did so already when the watch last looked.
    overdue: bool,
    /// Of those who wait for an answer, and some who have it: the watch ends waiting that lasts too long.
    tickets: Vec<Arc<Ticket>>,
    /// Lanes that are at work or called to it, those that rest, and the calls that none of them has heard yet.
    lanes: usize,
    resting: usize,
    called: usize,
    /// The peer is known to take exchanges.
    exchanges: bool,
}

/// A request on its way to a peer. Dropping it tells whoever waits that there will be no answer.
struct Errand {
    request: Request,
    ticket: Arc<Ticket>,
}

/// What a coroutine, or a thread, keeps while it waits for the answer to its errand.
struct Ticket {
    /// Nobody waits for longer: what has not been sent by then must not be.
    deadline: Instant,
    waiter: Blocker,
    answer: Mutex<Option<Answer>>,
}

impl Drop for Errand {
    fn drop(&mut self) {
        self.ticket.waiter.unpark();
    }
}

impl Errand {
    fn hand_in(self, answer: Answer) {
        *lock(&self.ticket.answer) = Some(answer);
    }

    /// Whether this can only travel in an exchange: between nodes, and with a target that the client would change. (It takes
    /// the segments `.` and `..` out, which may be keys, and makes something of its own of CONNECT.)
    fn needs_exchange(&self) -> bool {
        let (request, url) = (&self.request, self.request.url("peer"));
        let same = |sent: Url| percent_decode(sent[..Part::AfterQuery].as_bytes()).eq(percent_decode(url.as_bytes()));
        // A target that is no path would go on with the host: `@another:80/`.
        let is_path = request.target.starts_with('/') && request.verb != "CONNECT";
        request.origin != Origin::Client || !is_path || !Url::parse(&url).is_ok_and(same)
    }
}

impl Peer {
    fn at(address: &str) -> Arc<Peer> {
        let line = || Mutex::new(Line { exchanges: own().is_some(), ..Line::default() });
        let new = || Arc::new(Peer { address: address.into(), line: line(), ..Peer::default() });
        lock(&PEERS).entry(address.into()).or_insert_with(new).clone()
    }

    /// Takes a request to the peer and returns its answer; None if there is none in time, or the request runs in a ring.
    /// The request is sent once at most. After None it may have taken effect, as after any answer that got lost.
    fn relay(self: Arc<Peer>, mut request: Request, patience: Duration) -> Option<Answer> {
        if request.via.split(',').any(|hop| hop.trim() == *VIA) {
            return None;
        }
        request.via = if request.via.is_empty() { VIA.clone() } else { format!("{}, {}", request.via, *VIA) };
        let (deadline, waiter) = (Instant::now() + patience, Blocker::new(false));
        let ticket = Arc::new(Ticket { deadline, waiter, answer: Mutex::default() });
        let mut line = lock(&self.line);
        line.tickets.push(ticket.clone());
        line.waiting.push_back(Errand { request, ticket: ticket.clone() });
        let another = !line.exchanges && line.waiting.len() > 1;
        self.call_lane(line, another);
        // The watch ends this at the deadline: a timer for each request would cost more than the rest of the relay.
        let _ = ticket.waiter.park(None);
        lock(&ticket.answer).take()
    }

    /// Has a lane come if none is at work, or else perhaps another one, unless too many are. Takes the guard, so that the lane,
    /// which needs the line first of all, is called when it is free again.
    fn call_lane(self: &Arc<Peer>, mut line: MutexGuard<Line>, another: bool) {
        if line.lanes > 0 && (!another || line.lanes == MAX_LANES) {
            return;
        }
        line.lanes += 1;
        let rests = line.resting > 0;
        (line.resting, line.called) = (line.resting - usize::from(rests), line.called + usize::from(rests));
        drop(line);
        let peer = self.clone();
        if rests {
            self.wake.notify_one();
        } else if thread::Builder::new().spawn(move || peer.run_lane()).is_err() {
            lock(&self.line).lanes -= 1;
        }
    }

    /// A lane: takes out what waits, group by group, until nothing does for a moment. Then it rests, and ends if it is not called.
    fn run_lane(&self) {
        let mut since = Instant::now();
        loop {
            let mut line = lock(&self.line);
            let group = line.take_group();
            if !group.is_empty() {
                drop(line);
                // Should this panic, the group is dropped, which answers its requests, and the lane lives on.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.carry(group)));
            } else if since.elapsed() < LOOKOUT {
                drop(line);
                thread::yield_now();
                continue;
            } else {
                (line.lanes, line.resting) = (line.lanes - 1, line.resting + 1);
                let rested = self.wake.wait_timeout_while(line, REST, |line| line.called == 0);
                line = rested.unwrap_or_else(PoisonError::into_inner).0;
                if line.called == 0 {
                    line.resting -= 1;
                    return;
                }
                line.called -= 1;
            }
            since = Instant::now();
        }
    }

    /// Takes a group of requests to the peer, in an exchange unless it is one that can go by itself, and hands in the answers.
    /// None is just the way out: whoever waits is told when the group is dropped.
    fn carry(&self, mut group: Vec<Errand>) -> Option<()> {
        let together = group.len() > 1 || group[0].needs_exchange();
        let exchange = together.then(|| Request::exchange(&group));
        // The answers go on before the connection is closed, which takes as long as opening it.
        let (answer, _connection) = self.fetch(exchange.as_ref().unwrap_or(&group[0].request))?;
        // If the answer to an exchange is none, what became of the requests is not known: they are not sent again.
        let answers: Vec<Answer> = match together {
            true => (answer.header == EXCHANGE).then(|| postcard::from_bytes(&answer.body).ok())??,
            false => vec![answer],
        };
        // Those left over were not looked at: they are the first of the next group.
        let left_over = group.split_off(answers.len().min(group.len()));
        let mut line = lock(&self.line);
        left_over.into_iter().rev().for_each(|errand| line.waiting.push_front(errand));
        drop(line);
        // To wake a coroutine takes a thread a system call, and a coroutine none: one wakes all the others.
        may::go!(move || {
            for (errand, answer) in group.into_iter().zip(answers) {
                errand.hand_in(Answer { header: known_header(&answer.header), ..answer });
            }
        });
        Some(())
    }

    /// Sends one HTTP request and reads its answer; None if there is none. If there is no way to the peer at all, whatever
    /// else waits for it is told so as well.
    fn fetch(&self, request: &Request) -> Option<(Answer, impl Read + use<>)> {
        let host = self.look_up().ok_or(io::Error::from(HostUnreachable).into());
        let (began, answer) = (Instant::now(), host.and_then(|host| request.send(&host)));
        let mut line = lock(&self.line);
        line.exchanges = own().is_some() || answer.as_ref().is_ok_and(|(_, takes_exchanges, _)| *takes_exchanges);
        let cause = answer.as_ref().err().map(attohttpc::Error::kind).filter(|_| began.elapsed() < ANSWER_LIMIT);
        if matches!(cause, Some(ErrorKind::Io(error)) if NO_WAY.contains(&error.kind())) {
            line.waiting.clear();
        }
        answer.ok().map(|(answer, _, connection)| (answer, connection))
    }

    /// The peer's `host:port` with the name looked up, which the client would do for each request. A name that stands for
    /// several addresses is left to it, since it tries them side by side.
    fn look_up(&self) -> Option<String> {
        let asked = Instant::now();
        let mut lookup = lock(&self.lookup);
        // What another lane learned while this one waited for it is as good, also that there is no such name.
        let fresh =
            |(at, host): &(Instant, Option<String>)| *at >= asked || host.is_some() && at.elapsed() < LOOKUP_LIFETIME;
        if !lookup.as_ref().is_some_and(fresh) {
            let addresses = self.address.to_socket_addrs().map_or(Vec::new(), Iterator::collect);
            let host = if let [one] = addresses[..] { one.to_string() } else { self.address.clone() };
            *lookup = Some((Instant::now(), Some(host).filter(|_| !addresses.is_empty())));
        }
        lookup.clone()?.1
    }
}

impl Line {
    /// Takes what one exchange can carry off the head of the line; what nobody waits for any more is dropped.
    fn take_group(&mut self) -> Vec<Errand> {
        let (now, mut bytes) = (Instant::now(), 0);
        self.overdue = false;
        self.waiting.retain(|errand| errand.ticket.deadline > now);
        // A message may take long (to copy keys does), and travels alone.
        let mut fits = |Errand { request, .. }: &Errand| {
            bytes += request.body.len();
            bytes <= GROUP_BYTES && self.exchanges && request.origin != Origin::Message
        };
        let count = self.waiting.iter().take(GROUP_REQUESTS).take_while(|errand| fits(errand)).count();
        self.waiting.drain(..count.max(1).min(self.waiting.len())).collect()
    }
}

/// Calls another lane where those that are out do not come back, and ends waiting that is in vain.
fn watch_lines() {
    let (mut peers, now) = (lock(&PEERS), Instant::now());
    // Those that nobody asks any more have no lane either. (Any client can name a thousand in a view.)
    peers.retain(|_, peer| Arc::strong_count(peer) > 1);
    let asked: Vec<Arc<Peer>> = peers.values().cloned().collect();
    drop(peers);
    for peer in asked {
        let mut line = lock(&peer.line);
        line.tickets.extract_if(.., |ticket| ticket.deadline < now).for_each(|ticket| ticket.waiter.unpark());
        // Who has the answer has let go of the ticket.
        line.tickets.retain(|ticket| Arc::strong_count(ticket) > 1);
        let waiting = !line.waiting.is_empty();
        if std::mem::replace(&mut line.overdue, waiting) && waiting {
            peer.call_lane(line, true);
        }
    }
}

impl Request {
    fn exchange(group: &[Errand]) -> Request {
        let requests: Vec<&Request> = group.iter().map(|errand| &errand.request).collect();
        // Writing to a Vec cannot fail.
        let body = postcard::to_stdvec(&requests).unwrap_or_default();
        let (verb, target, content_type, via) = ("POST".into(), "/kv-store".into(), EXCHANGE_TYPE.into(), VIA.clone());
        Request { verb, target, content_type, via, body, ..Request::default() }
    }

    fn is_exchange(&self) -> bool {
        self.verb == "POST" && self.target == "/kv-store" && self.content_type == EXCHANGE_TYPE
    }

    /// The target on a host. What of it the client would change is for `needs_exchange` to tell.
    fn url(&self, host: &str) -> String {
        format!("http://{host}{}", self.target)
    }

    /// Sends the request to a host and reads the answer, of which status, `Content-Type`, `Allow` and body go on. With it
    /// come whether the host takes exchanges, and the connection, to be closed when there is time.
    fn send(&self, host: &str) -> attohttpc::Result<(Answer, bool, impl Read + use<>)> {
        let method = Method::from_bytes(self.verb.as_bytes()).unwrap_or(Method::GET);
        let mut builder = RequestBuilder::try_new(method, self.url(host))?
            .proxy_settings(ProxySettings::builder().build())
            .follow_redirects(false)
            .connect_timeout(CONNECT_LIMIT)
            .read_timeout(ANSWER_LIMIT)
            .try_header("Via", &self.via)?;
        if !self.content_type.is_empty() {
            builder = builder.try_header("Content-Type", &self.content_type)?;
        }
        if self.body.len() > 16 << 10 {
            // What exceeds the socket's buffer waits for the peer to read, and only this (a thread) limits that wait.
            builder = builder.timeout(ANSWER_LIMIT);
        }
        let (status, headers, mut reader) = builder.bytes(&self.body).send()?.split();
        let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let mut body = Vec::new();
        let length = reader.by_ref().take(MAX_ANSWER).read_to_end(&mut body)?;
        if value("Content-Length").is_some_and(|expected| expected.parse() != Ok(length)) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let content_type = value("Content-Type").unwrap_or("application/octet-stream");
        let allow = value("Allow").map_or(String::new(), |verbs| format!("\r\nAllow: {verbs}"));
        let header = format!("Content-Type: {content_type}{allow}").into();
        let takes_exchanges = value("Accept-Post") == Some(EXCHANGE_TYPE);
        Ok((Answer { status: status.as_u16(), header, body }, takes_exchanges, reader))
    }
}

/// Answers the requests of an exchange in order, until the answer is large enough. (Not inlined, as `find_owner`.)
#[inline(never)]
fn answer_exchange(body: &[u8]) -> Answer {
    // The number comes first, and is looked at first: tiny requests take many times the memory of their bytes. An exchange
    // inside an exchange would let a client choose how deep this recurses.
    let few = postcard::take_from_bytes::<usize>(body).is_ok_and(|(count, _)| count <= GROUP_REQUESTS);
    let requests = match postcard::from_bytes::<Vec<Request>>(if few { body } else { &[] }) {
        Ok(requests) if !requests.iter().any(Request::is_exchange) => requests,
        _ => return Outcome::BadRequest.answer(Vocabulary::Form, "POST"),
    };
    let mut room = EXCHANGE_BYTES as isize;
    let answer_in = |request| {
        let answer = (room > 0).then(|| answer(request))?;
        room -= answer.body.len() as isize;
        Some(answer)
    };
    let answers: Vec<Answer> = requests.into_iter().map_while(answer_in).collect();
    Answer::exchange(200, &answers)
}

// ---- View changes: another view, the same keys ----------------------------------------------------------------------
//
// The node that is asked coordinates, in two phases. Prepare: every node of the old and the new view holds its requests and
// says how many keys it has; keys above the cuts are copied to their new nodes. Commit: every node takes up the new table,
// which makes the copies count and the originals go. What fails before that ends in abort: the copies are dropped and the old
// table goes on. One node, the decider, commits before all others: whether it has decides for everyone, and a node that hears
// nothing from its coordinator asks it.

/// A prepared node that hears nothing from the coordinator for this long takes it for dead.
const LEASE: Duration = Duration::from_millis(2500);
/// A node that does not answer a message in this time is down.
const MESSAGE_LIMIT: Duration = Duration::from_millis(1500);
/// A message carries records with this many bytes, and one more: together no more than MAX_EXCHANGE.
const BATCH_BYTES: usize = 1 << 20;

/// A view change that this node is prepared for.
struct Change {
    id: u64,
    coordinator: String,
    decider: String,
    renewed: Instant,
    /// This node is the decider, and has asked the coordinator how the change ended: a commit that crosses comes too late.
    refuses_commit: bool,
    /// Copies of keys that become this node's.
    staged: Vec<Record>,
    /// The keys that this node keeps so far, in order; those above are copied. None before the first is.
    kept: Option<Vec<(u64, Record)>>,
}

/// What nodes say to one another, beside the requests that they relay. All but Meet go with the id of a view change.
#[derive(Clone, Serialize, Deserialize)]
enum Message {
    /// This is my address and table; what is yours?
    Meet(String, Table),
    /// Hold your requests for the view change that makes this version; the coordinator, the decider.
    Prepare(u64, String, String),
    /// Copy the highest of your keys that you have not copied yet to this node, so many at most.
    Copy(String, usize),
    /// Keep these copies.
    Stage(Vec<ByteBuf>),
    Commit(Table),
    /// If you have not committed, never do.
    Abort,
    /// The coordinator is alive. (To prepare again would forget copies where the lease ran out meanwhile.)
    Renew,
}

#[derive(Serialize, Deserialize)]
enum Reply {
    /// Done: my table, and whether all agree on it.
    Table(Table, bool),
    /// So many keys I have.
    Prepared(usize),
    /// So many keys are copied, down to this place.
    Copied(usize, Position),
    Refused,
}

/// Says something to a node. None if it does not answer in time.
fn tell(node: &str, id: u64, message: Message) -> Option<Reply> {
    let limit = match message {
        Message::Meet(..) => MEET_LIMIT,
        Message::Copy(..) => LEASE,
        _ => MESSAGE_LIMIT,
    };
    // The message names its addressee. A node by another name, or one behind a follower, would be counted twice or not at all.
    let body = postcard::to_stdvec(&(node, id, message)).ok()?;
    let answer = match is_own(node) {
        true => receive(&body),
        false => Peer::at(node).relay(Request { origin: Origin::Message, body, ..Request::default() }, limit)?,
    };
    postcard::from_bytes(&answer.body).ok()
}

/// Answers a message, if it is one and for this node.
fn receive(body: &[u8]) -> Answer {
    match postcard::from_bytes::<(&str, u64, Message)>(body) {
        Ok((node, id, message)) if is_own(node) => match act(id, message) {
            Some(reply) => Answer::exchange(200, &reply),
            None => Answer::exchange(409, &Reply::Refused),
        },
        _ => Outcome::BadRequest.answer(Vocabulary::Form, "POST"),
    }
}

/// Does what a message asks; None if it comes at the wrong time.
fn act(id: u64, message: Message) -> Option<Reply> {
    let mut store = lock(&STORE);
    match message {
        Message::Meet(sender, theirs) => store.consider(&sender, &theirs),
        Message::Prepare(version, coordinator, decider) => return store.prepare(id, version, coordinator, decider),
        Message::Copy(receiver, count) => {
            let (batch, lowest) = store.next_batch(id, count)?;
            let copied = batch.len();
            drop(store);
            let staged = tell(&receiver, id, Message::Stage(batch));
            return matches!(staged, Some(Reply::Table(..))).then_some(Reply::Copied(copied, lowest));
        }
        Message::Stage(copies) => {
            let copies: Option<Vec<Record>> = copies.iter().map(|copy| Record::from_bytes(copy)).collect();
            store.membership.prepared(id)?.staged.extend(copies?);
        }
        // Committed already.
        Message::Commit(table) if table.change == store.membership.table.change => {}
        Message::Commit(table) => {
            store.membership.prepared(id).filter(|change| !change.refuses_commit && table.is_whole())?;
            store.take_up(table);
        }
        Message::Abort => drop(store.membership.change.take_if(|change| change.id == id)),
        Message::Renew => drop(store.membership.prepared(id)?),
    }
    Some(Reply::Table(store.membership.table.clone(), store.membership.agreed))
}

impl Store {
    fn prepare(&mut self, id: u64, version: u64, coordinator: String, decider: String) -> Option<Reply> {
        if self.membership.change.is_none() && version > self.membership.table.version {
            let (renewed, refuses_commit, staged) = (Instant::now(), false, Vec::new());
            self.membership.change =
                Some(Change { id, coordinator, decider, renewed, refuses_commit, staged, kept: None });
        }
        self.membership.prepared(id).map(|_| Reply::Prepared(self.records.len()))
    }

    /// Takes the highest keys that are still kept, and says down to which place.
    fn next_batch(&mut self, id: u64, count: usize) -> Option<(Vec<ByteBuf>, Position)> {
        let kept = self.membership.prepared(id)?.kept.get_or_insert_with(|| in_order(&self.records));
        let (mut batch, mut bytes, mut lowest) = (Vec::new(), 0, Position::default());
        while let Some((hash, record)) = kept.pop_if(|_| batch.len() < count && bytes < BATCH_BYTES) {
            bytes += record.0.len();
            lowest = (hash, record.key().to_vec());
            batch.push(ByteBuf::from(&record.0[..]));
        }
        Some((batch, lowest))
    }
}

/// All records with the hashes of their keys, in the order of keys.
fn in_order(records: &HashSet<Record>) -> Vec<(u64, Record)> {
    let mut order: Vec<_> = records.iter().map(|record| (hash_of(record.key()), record.clone())).collect();
    order.sort_unstable_by(|one, other| (one.0, one.1.key()).cmp(&(other.0, other.1.key())));
    order
}

/// Ends a view change whose coordinator has been silent for a lease. The decider refuses from now on to commit and asks the
/// coordinator, which may have gone ahead alone; any other node asks the decider. Who is asked answers with its table, and if it
/// has not committed, never will.
fn end_abandoned_change() {
    let (id, asked, decides, since) = match &mut lock(&STORE).membership.change {
        Some(change) if change.renewed.elapsed() > LEASE => {
            change.refuses_commit = is_own(&change.decider);
            let asked = if change.refuses_commit { &change.coordinator } else { &change.decider };
            (change.id, asked.clone(), change.refuses_commit, change.renewed)
        }
        _ => return,
    };
    let reply = tell(&asked, id, Message::Abort);
    let mut store = lock(&STORE);
    match reply {
        // The coordinator may be alive: it may find that only the decider is silent, and go ahead.
        None if !decides && since.elapsed() < LEASE * 2 => {}
        // Meanwhile it ended.
        _ if store.membership.prepared(id).is_none() => {}
        Some(Reply::Table(table, _)) if table.change == id => store.take_up(table),
        Some(_) => store.membership.change = None,
        None => store.membership.orphans = store.membership.change.take().map(|change| (id, change.staged)),
    }
}

/// Changes the view, as PUT /kv-store/view-change asks. (Not inlined, as `find_owner`.)
#[inline(never)]
fn change_view(body: &[u8]) -> Result<Outcome, Outcome> {
    if own().is_none() {
        return Err(Outcome::AddressNotSet);
    }
    let view = member(body, "view")?;
    let view = match (serde_json::from_str::<String>(view), serde_json::from_str::<Vec<String>>(view)) {
        _ if view == "null" => return Err(Outcome::ViewMissing),
        (Ok(text), _) => parse_view(text.split(',')),
        (_, Ok(nodes)) => parse_view(nodes.iter().map(String::as_str)),
        _ => Err("it is neither a string nor an array of strings".into()),
    };
    let view = view.map_err(|reason| Outcome::ViewInvalid(reason.replace(['"', '\\'], "'")))?;
    Coordination::begin(&view, member(body, "force")? == "true")?.run()
}

/// A view change, as its coordinator sees it.
struct Coordination<'a> {
    id: u64,
    view: &'a [String],
    /// The table in force, and the version of the next.
    old: Table,
    version: u64,
    /// The nodes of both views, but for those that leave by force and do not answer.
    present: Vec<String>,
    /// Not this node if there is another: should this one die, the others learn from the decider how it ended.
    decider: String,
}

impl Coordination<'_> {
    /// Asks all nodes of the old and the new view for their tables; only one that leaves by force need not answer. This node
    /// takes part in any case: it decides if the decider is silent.
    fn begin(view: &[String], force: bool) -> Result<Coordination<'_>, Outcome> {
        let old = lock(&STORE).membership.table.clone();
        let nodes: BTreeSet<&str> = old.view.iter().chain(view).map(String::as_str).chain(own()).collect();
        let met =
            ask_all(nodes.iter().map(|node| node.to_string()).collect(), |node| meet(node).or_else(|| meet(node)));
        let gone: Vec<_> = met.iter().filter(|(_, reply)| reply.is_none()).map(|(node, _)| node).collect();
        if let Some(node) = gone.iter().find(|node| !force || view.contains(node)) {
            return Err(Outcome::NodeDown(node.to_string()));
        } else if !gone.is_empty() {
            // The silent node may only be stopped. Once its table is no longer FRESH, it asks before it answers by it.
            may::coroutine::sleep(FRESH + FRESH / 4);
        }
        let tables = || met.iter().filter_map(|(node, reply)| Some((node, &reply.as_ref()?.0)));
        let newest =
            tables().map(|(_, table)| table).filter(|table| table.view.len() > 1).max_by_key(|table| table.version);
        let mut store = lock(&STORE);
        if store.membership.change.is_some() {
            return Err(Outcome::ChangeUnderWay);
        } else if let Some(theirs) = newest
            && store.records.is_empty()
            && old.view.iter().all(|node| is_own(node))
        {
            // A node that has nothing of its own and is to join was asked: the store is the others'.
            store.take_up(theirs.clone());
        }
        if store.membership.table != old {
            drop(store);
            return Coordination::begin(view, force);
        }
        drop(store);
        // A node that is taken out of another store would still meet the rest of it, and take their keys for its own.
        let torn = |node: &String, view: &[String]| {
            view.contains(node) && !old.view.contains(node) && view.iter().any(|other| !nodes.contains(&**other))
        };
        if let Some((node, _)) = tables().find(|(node, table)| torn(node, &table.view)) {
            return Err(Outcome::HoldsKeys(node.clone()));
        }
        let version = tables().map(|(_, table)| table.version).fold(old.version, u64::max) + 1;
        let present: Vec<String> =
            met.iter().filter(|(_, reply)| reply.is_some()).map(|(node, _)| node.clone()).collect();
        let decider = present.iter().find(|node| !is_own(node)).unwrap_or(&present[0]).clone();
        Ok(Coordination { id: RandomState::new().hash_one(version).max(1), view, old, version, present, decider })
    }

    /// Runs the change to its end. The error is an outcome as well, and the old view stays in force.
    fn run(&self) -> Result<Outcome, Outcome> {
        let planned = self.prepare().and_then(|mut counts| {
            let moves = plan(&mut counts, self.view);
            let cuts = self.copy(&moves)?;
            let table = match counts.values().sum() {
                0 => Table::first(self.view.to_vec()),
                _ => self.old.after(self.view, &cuts),
            };
            Ok((Table { version: self.version, change: self.id, ..table }, counts, moves))
        });
        let abort = || drop(self.tell_all(&self.present, Message::Abort));
        let (table, counts, moves) = planned.inspect_err(|_| abort())?;
        match self.decide(&table) {
            Some(Reply::Table(..)) => {}
            // It had not heard from this node for long, and gave the change up.
            Some(_) => {
                abort();
                return Err(Outcome::ChangeUnderWay);
            }
            // It may have committed, so this must not abort: whoever is prepared will ask it.
            None => return Err(Outcome::NodeDown(self.decider.clone())),
        }
        let shard = |node| format!(r#"{{"address":"{node}","key-count":{}}}"#, counts[node]);
        let shards = self.view.iter().map(shard).collect::<Vec<_>>().join(",");
        let moved: usize = moves.iter().map(|(.., count)| count).sum();
        let commit = |nodes: Vec<String>, _| self.tell_all(&nodes, Message::Commit(table.clone()));
        let nodes = (0..3).fold(self.present.clone(), commit).join(r#"",""#);
        let unreached = if nodes.is_empty() { nodes } else { format!(r#","unreached":["{nodes}"]"#) };
        Ok(Outcome::ViewChanged(format!(r#""moved":{moved},"shards":[{shards}]{unreached}"#)))
    }

    /// Tells nodes the same, and returns those that did not agree.
    fn tell_all(&self, nodes: &[String], message: Message) -> Vec<String> {
        let mut told = ask_all(nodes.to_vec(), |node| tell(node, self.id, message.clone()));
        told.retain(|(_, reply)| !matches!(reply, Some(Reply::Table(..))));
        told.into_iter().map(|(node, _)| node).collect()
    }

    /// All nodes hold their requests, and say how many keys they have. They are asked in order, so that of two coordinators
    /// one fails at the first node that both ask, and does not hold nodes that the other needs.
    fn prepare(&self) -> Result<BTreeMap<String, usize>, Outcome> {
        let (own, joins) = (own().unwrap_or_default(), |node: &String| !self.old.view.contains(node));
        let prepare = || Message::Prepare(self.version, own.into(), self.decider.clone());
        let count = |node: &String| match tell(node, self.id, prepare()) {
            Some(Reply::Prepared(count)) if count > 0 && joins(node) => Err(Outcome::HoldsKeys(node.clone())),
            Some(Reply::Prepared(count)) => Ok((node.clone(), count)),
            Some(_) => Err(Outcome::ChangeUnderWay),
            None => Err(Outcome::NodeDown(node.clone())),
        };
        self.present.iter().map(count).collect()
    }

    /// Has the givers copy what they give, and returns their cuts.
    fn copy(&self, moves: &[(String, String, usize)]) -> Result<Vec<(String, Position, String)>, Outcome> {
        let mut cuts = Vec::new();
        for (giver, receiver, count) in moves {
            let (mut left, mut place) = (*count, Position::default());
            while left > 0 {
                match tell(giver, self.id, Message::Copy(receiver.clone(), left)) {
                    Some(Reply::Copied(copied, lowest)) if copied > 0 => (left, place) = (left - copied, lowest),
                    // The giver did not get through to the receiver.
                    Some(_) => return Err(Outcome::NodeDown(receiver.clone())),
                    None => return Err(Outcome::NodeDown(giver.clone())),
                }
                if let Some(node) = self.tell_all(&self.present, Message::Renew).pop() {
                    return Err(Outcome::NodeDown(node));
                }
            }
            cuts.push((giver.clone(), place, receiver.clone()));
        }
        Ok(cuts)
    }

    /// The decider's yes is the point of no return. If the decider is silent, it is this node's own, as long as all others are
    /// prepared: nobody then has heard from the decider that it will not commit. None if that cannot be known.
    fn decide(&self, table: &Table) -> Option<Reply> {
        let commit = |node| tell(node, self.id, Message::Commit(table.clone()));
        let others: Vec<String> = self.present.iter().filter(|node| **node != self.decider).cloned().collect();
        let alone = || self.tell_all(&others, Message::Renew).is_empty().then(|| commit(own()?)).flatten();
        commit(&self.decider).or_else(alone)
    }
}

// ---- Connections: where the bytes come from and go to ---------------------------------------------------------------
//
// may_minihttp parses requests and sends answers, many of them in one write where a client pipelines. What it cannot do is
// done on the socket, behind its back: answer what it refused to parse, answer without a body (HEAD), and close. Each of
// these is a connection's last word. So that it does not overtake, drop or repeat an answer, a connection keeps a copy of
// those that it handed to the server until the kernel has them.

/// One client connection: the server's service.
struct Connection {
    socket: Socket,
    /// Goes up when a request begins to be answered and when it has been: the watch looks at it.
    calls: Arc<AtomicU32>,
    /// Answers that the server may not have written yet, and where each ends in the stream of answers.
    unsent: VecDeque<(u64, Answer)>,
    /// The bytes of that stream: those that the server was handed, and those that the kernel was seen to have.
    /// What lies between them is what `unsent` covers.
    handed: u64,
    taken: u64,
    /// The last word is said. What the server still reads is not looked at.
    ended: bool,
    /// The client may still be sending when the connection is closed.
    lingers: bool,
    /// The last request came by way of another instance.
    relayed: bool,
}

struct Server;

impl HttpServiceFactory for Server {
    type Service = Connection;

    /// Called once for each connection. `id` is the descriptor of its socket, open until after the service is dropped.
    fn new_service(&self, id: usize) -> Connection {
        let (socket, calls) = (borrow_socket(id as RawFd), Arc::<AtomicU32>::default());
        // Without this, an answer that leaves in two writes waits 40 ms for the client's delayed acknowledgement.
        let _ = socket.set_nodelay(true);
        let mut connections = lock(&CONNECTIONS);
        // The accept loop would spin without end if descriptors ran out: the last ones are never used.
        let crowded = connections.len() >= *MAX_CONNECTIONS;
        if crowded {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let watched = Watched { calls: calls.clone(), seen: 0, since: Instant::now(), received: None };
        connections.insert(id as RawFd, watched);
        let (unsent, lingers, relayed) = (VecDeque::new(), false, false);
        Connection { socket, calls, unsent, handed: 0, taken: 0, ended: crowded, lingers, relayed }
    }
}

impl HttpService for Connection {
    fn call(&mut self, parsed: Parsed, response: &mut Response) -> io::Result<()> {
        if !self.ended {
            self.calls.fetch_add(1, SeqCst);
            self.serve(parsed, response);
            self.calls.fetch_add(1, SeqCst);
        }
        Ok(())
    }
}

impl Connection {
    fn serve(&mut self, parsed: Parsed, response: &mut Response) {
        let (mut request, framing) = match read_head(&parsed) {
            Ok(head) => head,
            Err(refusal) => return self.refuse(refusal.answer(Vocabulary::Form, "GET")),
        };
        self.relayed = !request.via.is_empty();
        if request.oversized {
            let (resource, vocabulary) = request.route();
            let refusal = perform(&resource, &request, vocabulary).unwrap_or(Outcome::BadRequest);
            return self.refuse(refusal.answer(vocabulary, &request.verb));
        }
        if framing.expects_continue {
            self.send_continue();
        }
        if request.ignores_body() {
            // Dropping the reader reads it to its end.
            drop(parsed.body());
        } else if framing.length > 0 && !self.read_body(parsed.body(), framing.length, &mut request.body) {
            return self.end();
        }
        let answer = answer(request);
        // The server takes only headers that live forever: those of a foreign main instance go out as a last word. And it
        // would collect answers without end for a client that does not read them.
        let unfit = matches!(answer.header, Cow::Owned(_)) || self.handed - self.taken > MAX_UNSENT;
        if framing.closing || framing.is_head || unfit {
            self.lingers = !framing.closing;
            self.say_last_word(&answer, framing.is_head);
        } else {
            self.hand_over(answer, response);
        }
    }

    /// Reads a whole body. False is a client that left before it was complete: its request never happened.
    fn read_body(&self, mut reader: BodyReader, length: usize, body: &mut Vec<u8>) -> bool {
        let arrived = reader.fill_buf().unwrap_or_default();
        if arrived.len() == length {
            // Dropping the reader takes them out of the server's buffer.
            body.extend(arrived);
            return true;
        }
        let complete = reader.read_to_end(body).is_ok_and(|taken| taken == length);
        signal_again(&self.socket);
        complete
    }

    /// Gives an answer to the server, which sends it when it has looked at all that it has read.
    fn hand_over(&mut self, answer: Answer, response: &mut Response) {
        self.handed += answer.length() as u64;
        self.unsent.push_back((self.handed, answer.clone()));
        response.status_code(answer.status.into(), answer.reason());
        if let Cow::Borrowed(header) = answer.header {
            response.header(header);
        }
        response.body_vec(answer.body);
        if self.handed - self.taken > 4 << 10 {
            self.forget_taken();
            may::coroutine::yield_now();
        }
    }

    /// Forgets the answers that the kernel has. It counts what it was given, and it is given nothing but answers.
    fn forget_taken(&mut self) {
        let Some(info) = info(&self.socket) else { return };
        let given = info.tcpi_bytes_sent - info.tcpi_bytes_retrans + u64::from(info.tcpi_notsent_bytes);
        self.taken = given.min(self.handed);
        while self.unsent.pop_front_if(|(end, _)| *end <= self.taken).is_some() {}
    }

    /// Tells a client that asked first that it may send its body. While answers before this one are on their way nothing
    /// is said: such a client sends its body unasked after a moment (RFC 9110 section 10.1.1).
    fn send_continue(&mut self) {
        self.forget_taken();
        if self.unsent.is_empty() {
            self.handed += (&*self.socket).write(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(0) as u64;
        }
    }

    /// Answers a request whose end is not known or not worth waiting for.
    fn refuse(&mut self, answer: Answer) {
        self.lingers = true;
        self.say_last_word(&answer, false);
    }

    /// Sends an answer directly, after what the server has not sent of those before it, and closes the connection.
    fn say_last_word(&mut self, answer: &Answer, without_body: bool) {
        let mut bytes = Vec::new();
        self.forget_taken();
        self.unsent.drain(..).for_each(|(_, answer)| answer.write(&mut bytes, "", false));
        let missing = (self.handed - self.taken) as usize;
        bytes.drain(..bytes.len().saturating_sub(missing));
        // Followers ask one thing a connection, so this reaches them (W3C, Linked Data Platform, section 7.1).
        let takes_exchanges = self.relayed && matches!(SETTINGS.role, Role::Main);
        let accepts = if takes_exchanges { format!("Accept-Post: {EXCHANGE_TYPE}\r\n") } else { String::new() };
        answer.write(&mut bytes, &format!("{CLOSE}{accepts}"), without_body);
        let sent = send_held(&self.socket, &bytes).unwrap_or(0);
        if sent < bytes.len() {
            let _ = waiting_stream(&self.socket, IDLE_LIMIT).and_then(|mut stream| stream.write_all(&bytes[sent..]));
        }
        self.end();
    }

    /// Lets nothing more out: the server's next write fails, and then it closes the connection. The end of the stream
    /// leaves together with the last answer. So this side, and not a relaying one, is the first to close and has its port
    /// in TIME_WAIT (RFC 9293 section 3.6.1): 28,000 relays in a minute would use up the other side's ports.
    fn end(&mut self) {
        self.ended = true;
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// The server is done with the connection: the client left, or sent something that is not HTTP or has too many headers. To
/// that, the server says nothing; this does.
impl Drop for Connection {
    fn drop(&mut self) {
        lock(&CONNECTIONS).remove(&self.socket.as_raw_fd());
        let received = info(&self.socket).map_or(0, |info| info.tcpi_bytes_received);
        let left = matches!(self.socket.peek(&mut [0]), Ok(0));
        // The server does not look at what it read if it came together with the end of the stream (which counts as a byte).
        let unheard = received > 1 && self.calls.load(SeqCst) == 0;
        if !self.ended && (!left || unheard) {
            self.refuse(Outcome::BadRequest.answer(Vocabulary::Form, "GET"));
        }
        // Closing a socket with unread input resets the connection, and the reset may reach the client before it has read its
        // answer: what it still sends is read and forgotten.
        if self.lingers
            && let Ok(mut stream) = waiting_stream(&self.socket, Duration::from_secs(1))
        {
            let deadline = Instant::now() + Duration::from_secs(5);
            while Instant::now() < deadline && stream.read(&mut [0; 512]).is_ok_and(|count| count > 0) {}
        }
    }
}

/// What the watch remembers of a connection.
struct Watched {
    calls: Arc<AtomicU32>,
    /// The calls when last seen: odd while a request is being answered. Since when.
    seen: u32,
    since: Instant,
    /// What had been received when they were seen to stay the same.
    received: Option<u64>,
}

static CONNECTIONS: LazyLock<Mutex<HashMap<RawFd, Watched>>> = LazyLock::new(Default::default);
/// The files that the system lets this process open, less some for everything else; and half the mappings that Linux lets a
/// process have: a coroutine's stack takes two, and without one the server ends.
static MAX_CONNECTIONS: LazyLock<usize> =
    LazyLock::new(|| rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024).saturating_sub(200).min(30_000) as usize);

/// Ends connections that do nothing for a minute, and those with an endless head. This is a thread and no coroutine: a
/// client that never stops sending a head keeps a worker busy.
fn watch_connections() {
    let mut connections = lock(&CONNECTIONS);
    connections.iter_mut().for_each(|(fd, watched)| watched.look(borrow_socket(*fd)));
    // An endless head grows by a gigabyte a second: look often, as long as there are few to look at.
    let more = Duration::from_micros(20) * connections.len() as u32;
    drop(connections);
    thread::sleep(more);
}

impl Watched {
    fn look(&mut self, socket: Socket) {
        let calls = self.calls.load(SeqCst);
        if self.seen != calls {
            // A connection that gets on costs nothing here.
            (self.seen, self.since, self.received) = (calls, Instant::now(), None);
            return;
        }
        let Some(info) = info(&socket) else { return };
        let received = *self.received.get_or_insert(info.tcpi_bytes_received);
        let (answering, limit) = (calls % 2 == 1, IDLE_LIMIT.as_millis() as u32);
        let sending = info.tcpi_notsent_bytes + info.tcpi_unacked > 0 && info.tcpi_last_ack_recv < limit;
        let receiving = answering && info.tcpi_last_data_recv < limit;
        let unread = unread(&socket);
        // What was just learned is of different moments. If a request began or ended meanwhile, it says nothing.
        if self.calls.load(SeqCst) != calls {
            return;
        }
        if !answering && unread > 0 {
            signal_again(&socket);
        }
        if !answering && info.tcpi_bytes_received - received > MAX_HEAD as u64 + unread {
            // The server has nothing to send here, so this answer is in nobody's way.
            let mut refusal = Vec::new();
            Outcome::BadRequest.answer(Vocabulary::Form, "GET").write(&mut refusal, CLOSE, false);
            let _ = send_held(&socket, &refusal);
        } else if self.since.elapsed() < IDLE_LIMIT || sending || receiving {
            return;
        }
        let _ = socket.shutdown(Shutdown::Both);
    }
}

// ---- The socket, behind the server's back ---------------------------------------------------------------------------

/// A socket that the server owns, and closes after the service of its connection is dropped. Only that service, and the
/// watch as long as the list of connections has the service, may hold one.
type Socket = ManuallyDrop<TcpStream>;

fn borrow_socket(fd: RawFd) -> Socket {
    // SAFETY: whoever may hold a Socket holds it while the descriptor is open; ManuallyDrop never closes it.
    ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) })
}

/// Sends what the kernel takes at once. The last packet is held back until more is sent or the stream ends, so that a
/// client that has the whole answer has its end as well.
fn send_held(socket: &Socket, bytes: &[u8]) -> io::Result<usize> {
    socket2::SockRef::from(&**socket).send_with_flags(bytes, libc::MSG_MORE | libc::MSG_NOSIGNAL)
}

/// The same socket as a stream that makes the coroutine wait, and not its worker: for `limit` at most. While a panic ends
/// the coroutine there is none: it cannot wait any more.
fn waiting_stream(socket: &Socket, limit: Duration) -> io::Result<may::net::TcpStream> {
    if thread::panicking() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // SAFETY: the descriptor is a fresh one, and the stream becomes its only owner.
    let stream = unsafe { may::net::TcpStream::from_raw_fd(socket.try_clone()?.into_raw_fd()) };
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

/// Has the kernel signal input once more, if there is any (setting SO_RCVLOWAT does). The server waits for a signal that
/// comes once an arrival; reading a body uses it up, and a request that came with the body's end would be left lying.
fn signal_again(socket: &Socket) {
    let (one, size) = (&1 as *const libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: setsockopt reads an int, which outlives the call.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, one.cast(), size) };
}

/// What the kernel knows of the connection (all of it since Linux 4.19).
fn info(socket: &Socket) -> Option<libc::tcp_info> {
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: a struct of integers may be zero, and getsockopt writes no more than `size` bytes.
    unsafe {
        let mut info: libc::tcp_info = std::mem::zeroed();
        let into = (&mut info as *mut libc::tcp_info).cast();
        let result = libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, into, &mut size);
        (result == 0).then_some(info)
    }
}

/// What has arrived and was not read yet, in bytes.
fn unread(socket: &Socket) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &mut count) };
    count as u64
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

fn serve(Settings { listen, role, view }: &'static Settings) {
    // As PID 1 of a container a process ignores these signals unless it says otherwise. There is nothing to save.
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 0, Arc::new(AtomicBool::new(true)));
    }
    let description = match role {
        Role::Main => "main instance".into(),
        Role::Follower(main) => format!("follower of {main}"),
        Role::Node(address) => format!("node {address} of {}", view.join(",")),
    };
    if let Role::Node(_) = role {
        lock(&STORE).membership.table = Table::first(view.clone());
        repeat(Duration::from_millis(100), keep_in_touch);
        repeat(Duration::from_millis(100), end_abandoned_change);
    }
    may::config().set_stack_size(16 << 10).set_worker_pin(false);
    // may shares a port with whoever else does (SO_REUSEPORT), and two stores would share the clients: ask without first.
    let server = TcpListener::bind(listen).map(drop).and_then(|()| Server.start(listen)).unwrap_or_else(|error| {
        let (ip, port) = (listen.ip(), listen.port());
        fail(1, &format!("IP={ip} PORT={port}: expected an address and port that can be listened on: {error}"))
    });
    say(&format!("{description}, version {VERSION}, listening on {listen}"));
    repeat(Duration::from_millis(5), watch_connections);
    repeat(OVERDUE, watch_lines);
    let _ = server.join();
    fail(1, &format!("IP={} PORT={}: expected to go on listening, but the server ended", listen.ip(), listen.port()))
}

/// Has a thread of its own do something again and again.
fn repeat(pause: Duration, work: fn()) {
    thread::spawn(move || {
        loop {
            work();
            thread::sleep(pause);
        }
    });
}

/// Writes a line to stderr. The program goes on if it cannot, where eprintln! would not.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "kv-store: {}", line.replace('\n', "\\n"));
}

fn fail(status: i32, line: &str) -> ! {
    say(line);
    exit(status)
}

/// Asks the instance on this machine whether it answers, as Docker's health check does. (A connection to 0.0.0.0 or [::] is one
/// to this machine.)
fn is_healthy(listen: SocketAddr) -> bool {
    let request = Request { verb: "GET".into(), target: "/kv-store".into(), ..Request::default() };
    request.send(&listen.to_string()).is_ok_and(|(answer, ..)| answer.status == 200)
}

#[cfg(test)]
mod tests {
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

    fn record(key: &str) -> Record {
        Record::new(key.as_bytes(), r#""value""#)
    }

    /// A whole store in one place: what each node holds, and the table.
    type Simulation = (Table, BTreeMap<String, HashSet<Record>>);

    fn put(store: &mut Simulation, key: &str) {
        let owner = store.0.owner(key.as_bytes()).to_owned();
        store.1.entry(owner).or_default().insert(record(key));
    }

    /// What a view change does, without the network. Returns how many keys moved.
    fn change(store: &mut Simulation, view: &[String]) -> usize {
        let (table, shards) = store;
        let nodes: BTreeSet<&String> = table.view.iter().chain(view).collect();
        let count = |node: &String| shards.get(node).map_or(0, HashSet::len);
        let mut counts: BTreeMap<String, usize> = nodes.iter().map(|node| (node.to_string(), count(node))).collect();
        let moves = plan(&mut counts, view);
        let (mut cuts, mut copies) = (Vec::new(), Vec::new());
        let mut kept: HashMap<&String, Vec<(u64, Record)>> =
            shards.iter().map(|(node, shard)| (node, in_order(shard))).collect();
        for (giver, receiver, count) in &moves {
            let order = kept.get_mut(giver).expect("a node without keys gives none");
            let given = order.split_off(order.len() - count);
            cuts.push((giver.clone(), (given[0].0, given[0].1.key().to_vec()), receiver.clone()));
            copies.extend(given.into_iter().map(|(_, record)| (record, receiver.clone())));
        }
        let next = table.after(view, &cuts);
        for (copy, receiver) in copies {
            shards.entry(receiver).or_default().insert(copy);
        }
        for (node, shard) in shards.iter_mut() {
            shard.retain(|record| next.owner(record.key()) == node);
        }
        *table = next;
        moves.iter().map(|(.., count)| count).sum()
    }

    #[test]
    fn shards_differ_by_one_key_and_no_key_moves_without_need() {
        let mut numbers = Numbers(1);
        for case in 0..300 {
            let view = numbers.nodes(1);
            let mut store: Simulation = (Table::first(view), BTreeMap::new());
            let keys = [0, 1, 2, 3, 7, 10, 100, 1000][case % 8];
            (0..keys).for_each(|number| put(&mut store, &format!("{case} {number}")));
            for round in 0..4 {
                let view = numbers.nodes(1);
                let total: usize = store.1.values().map(HashSet::len).sum();
                let (least, rest) = (total / view.len(), total % view.len());
                // What nodes have above their target, if those with most keys may keep one more.
                let mut held: Vec<usize> = view.iter().map(|node| store.1.get(node).map_or(0, HashSet::len)).collect();
                held.sort_by_key(|count| Reverse(*count));
                let stays: usize =
                    held.iter().enumerate().map(|(rank, count)| (*count).min(least + usize::from(rank < rest))).sum();
                assert_eq!(change(&mut store, &view), total - stays, "case {case}, round {round}");
                assert!(store.0.is_whole(), "case {case}: {:?}", store.0);
                let sizes: Vec<usize> = view.iter().map(|node| store.1.get(node).map_or(0, HashSet::len)).collect();
                assert_eq!(sizes.iter().sum::<usize>(), total, "case {case}, round {round}: keys got lost");
                assert!(
                    sizes.iter().all(|size| (least..=least + 1).contains(size)),
                    "case {case}: {sizes:?} of {total}"
                );
                assert_eq!(change(&mut store, &view), 0, "case {case}: the same view again");
                // Keys come and go between view changes.
                (0..numbers.below(20)).for_each(|number| put(&mut store, &format!("{case} {round} {number}")));
                let leaving = numbers.below(3);
                store.1.values_mut().for_each(|shard| {
                    shard.retain(|record| record.key().last().is_some_and(|it| it % 3 != leaving as u8))
                });
            }
        }
    }

    #[test]
    fn a_fourth_node_takes_a_quarter() {
        let node = |number| format!("n{number}:1");
        let mut store: Simulation = (Table::first((1..=3).map(node).collect()), BTreeMap::new());
        (0..100_001).for_each(|number| put(&mut store, &number.to_string()));
        change(&mut store, &(1..=3).map(node).collect::<Vec<_>>());
        assert_eq!(change(&mut store, &(1..=4).map(node).collect::<Vec<_>>()), 25_000);
    }

    #[test]
    fn keys_with_the_same_hash_are_told_apart() {
        let table = Table {
            view: vec!["a:1".into(), "b:1".into()],
            ranges: vec![(Position::default(), 0), ((7, b"m".to_vec()), 1), ((8, Vec::new()), 0)],
            ..Table::default()
        };
        assert!(table.is_whole());
        assert_eq!((table.index_of(7, b"l"), table.index_of(7, b"m"), table.index_of(8, b"")), (0, 1, 0));
    }

    #[test]
    fn tables_that_do_not_cover_the_hash_space_are_not_whole() {
        let view = vec!["a:1".to_owned()];
        let with = |ranges: Vec<(Position, usize)>| Table { view: view.clone(), ranges, ..Table::default() };
        assert!(with(vec![(Position::default(), 0)]).is_whole());
        assert!(!with(vec![]).is_whole());
        assert!(!with(vec![((1, vec![]), 0)]).is_whole());
        assert!(!with(vec![(Position::default(), 1)]).is_whole());
        assert!(!with(vec![(Position::default(), 0), (Position::default(), 0)]).is_whole());
    }

    #[test]
    fn the_hash_is_the_published_one() {
        // The first test vector of the authors' reference code is for a key of 00 to 0f; these are for one of zeros.
        assert_eq!(hash_of(b""), 0x1e924b9d737700d7);
        let shares = (0..30_000).fold([0; 3], |mut shares, number: u32| {
            shares[Table::first(vec![String::new(); 3]).index_of(hash_of(number.to_string().as_bytes()), b"")] += 1;
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

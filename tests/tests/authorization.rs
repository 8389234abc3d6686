//! Promise: who may call what. Every method of every service, taken from the descriptors, is called with every role, with all
//! other roles together, with no role and without a token. A method that is new and has no row here fails the test.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use esker_proto::v1::events_client::EventsClient;
use esker_proto::v1::sessions_client::SessionsClient;
use esker_proto::v1::{self, FILE_DESCRIPTOR_SET};
use esker_tests::identity::{Bearer, Claims, Issuer, forged, spiffe};
use esker_tests::{Node, output, scratch, text_of, web};
use http::uri::PathAndQuery;
use prost::Message;
use tonic::client::Grpc;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

const ROLES: [&str; 6] = ["reader", "writer", "publisher", "pinner", "billing-reader", "admin"];

/// Who may call a method; written down a second time, on purpose, by what each role is for.
fn expected(method: &str) -> Option<&'static [&'static str]> {
    Some(match method {
        "PrefixCache/RegisterNamespace" | "PrefixCache/Put" | "Local/PutLocal" => &["writer", "publisher"],
        "PrefixCache/Lookup"
        | "PrefixCache/LookupMany"
        | "PrefixCache/Fetch"
        | "PrefixCache/Settle"
        | "PrefixCache/Release"
        | "Local/FetchLocal" => &["reader"],
        "Decoder/Describe" | "Decoder/Tokenize" | "Decoder/Generate" => &["reader"],
        "Sessions/OpenSession"
        | "Sessions/ExtendSession"
        | "Sessions/RenewSession"
        | "Sessions/CloseSession" => &["pinner"],
        "Sessions/ListSessions" => &["pinner", "reader"],
        "Warmup/SubmitWarmup" | "Warmup/CancelWarmup" => &["writer", "publisher"],
        "Warmup/GetWarmup" | "Warmup/WatchWarmup" | "Warmup/ListWarmups" => {
            &["writer", "publisher", "reader"]
        }
        "Events/Subscribe" => &["reader"],
        "Usage/QueryUsage" => &["billing-reader", "reader"],
        "Usage/ExportUsage" => &["billing-reader"],
        "Admin/EraseTenant" | "Admin/RevokeWriter" | "Admin/ListTenants" => &["admin"],
        _ => return None,
    })
}

/// `Service/Method` of every method that esker.v1 has.
fn methods() -> Result<Vec<String>> {
    let set = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET)?;
    let services = set.file.iter().filter(|file| file.package() == "esker.v1").flat_map(|file| &file.service);
    let names = services.flat_map(|service| {
        service.method.iter().map(|method| format!("{}/{}", service.name(), method.name()))
    });
    Ok(names.collect())
}

type Caller = Grpc<InterceptedService<Channel, Bearer>>;

/// Calls a method with an empty message; what it answers first, an end without a message included.
async fn call<C>(grpc: &mut Grpc<C>, path: &str) -> Result<Code>
where
    C: tonic::client::GrpcService<tonic::body::Body>,
    C::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    C::ResponseBody: tonic::codegen::Body<Data = bytes::Bytes> + Send + 'static,
    <C::ResponseBody as tonic::codegen::Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let answer = async {
        grpc.ready().await.map_err(|error| Status::unknown(error.into().to_string()))?;
        let codec = ProstCodec::<(), ()>::default();
        let path = PathAndQuery::try_from(path).map_err(|error| Status::unknown(error.to_string()))?;
        let mut request = Request::new(tokio_stream::once(()));
        request.set_timeout(Duration::from_secs(10));
        grpc.streaming(request, path, codec).await?.into_inner().message().await
    };
    let answer = tokio::time::timeout(Duration::from_secs(10), answer).await.context("no answer")?;
    Ok(answer.map_or_else(|status: Status| status.code(), |_| Code::Ok))
}

fn caller(node: &Node, bearer: Bearer) -> Caller {
    Grpc::new(InterceptedService::new(node.channel.clone(), bearer))
}

#[tokio::test]
async fn every_method_with_every_role() -> Result<()> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy("[tenants.acme]\n")?;
    let node = Node::start(
        &folder.path().join("data"),
        &["--segment-mib", "4", "--policy", policy.to_str().context("a path")?],
    )
    .await?;
    let methods = methods()?;
    ensure!(methods.len() > 20, "the descriptors name only {} methods", methods.len());
    let denied = [Code::PermissionDenied, Code::Unauthenticated];
    let mut calls = 0;
    for method in &methods {
        let roles = expected(method).with_context(|| format!("{method} has no row in this test"))?;
        let path = format!("/esker.v1.{method}");
        for role in ROLES {
            let code = call(&mut caller(&node, issuer.token("acme", &[role])?), &path).await?;
            if roles.contains(&role) {
                // What the message lacks comes up behind the door; a role that may do part of it may be told so.
                let partly = code == Code::PermissionDenied && roles.len() > 1;
                ensure!(!denied.contains(&code) || partly, "{method} as {role}: {code:?}");
            } else {
                ensure!(code == Code::PermissionDenied, "{method} as {role}: {code:?}");
            }
            calls += 1;
        }
        let others: Vec<&str> = ROLES.into_iter().filter(|role| !roles.contains(role)).collect();
        for (roles, what) in [(others, "all other roles"), (vec![], "no role")] {
            let code = call(&mut caller(&node, issuer.token("acme", &roles)?), &path).await?;
            ensure!(code == Code::PermissionDenied, "{method} with {what}: {code:?}");
        }
        let code = call(&mut Grpc::new(node.channel.clone()), &path).await?;
        ensure!(code == Code::Unauthenticated, "{method} without a token: {code:?}");
        calls += 3;
    }
    let unknown = call(&mut caller(&node, issuer.token("acme", &ROLES)?), "/esker.v1.Admin/DropAll").await?;
    ensure!(unknown == Code::PermissionDenied, "a method that is not there: {unknown:?}");
    let health = call(&mut Grpc::new(node.channel.clone()), "/grpc.health.v1.Health/Check").await?;
    ensure!(health == Code::Ok, "a health check asks nobody who they are: {health:?}");
    println!("{} methods, {calls} calls", methods.len());
    // What was denied is in the audit log, up to its bound a second.
    let audit = std::fs::read_to_string(folder.path().join("data/audit.jsonl"))?;
    ensure!(audit.contains("/esker.v1.PrefixCache/RegisterNamespace") && audit.contains("denied"), "{audit}");
    node.kill()
}

#[tokio::test]
async fn a_token_that_is_not_quite_right_is_refused() -> Result<()> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy("[tenants.acme]\n")?;
    let node = Node::start(
        &folder.path().join("data"),
        &["--no-model", "--segment-mib", "4", "--policy", policy.to_str().context("a path")?],
    )
    .await?;
    let good = Claims::new("acme", &["admin"]);
    let wrong = |change: fn(&mut Claims)| {
        let mut claims = good.clone();
        change(&mut claims);
        issuer.sign(&claims)
    };
    let sign_with_nothing = {
        // `alg: none`, with the claims of a good token.
        let token = issuer.sign(&good)?;
        let claims = token.split('.').nth(1).context("a JWT has claims")?;
        // {"alg":"none","kid":"fleet-1"}
        format!("eyJhbGciOiJub25lIiwia2lkIjoiZmxlZXQtMSJ9.{claims}.")
    };
    for (token, what) in [
        (wrong(|claims| claims.exp = claims.iat - 600)?, "over"),
        (wrong(|claims| claims.exp = claims.iat + 7200)?, "lives for two hours"),
        (wrong(|claims| (claims.iat, claims.exp) = (claims.iat + 600, claims.exp + 600))?, "of the future"),
        (wrong(|claims| claims.aud = "another".into())?, "for another service"),
        (wrong(|claims| claims.tenant = "nobody".into())?, "of a tenant that is not in the policy"),
        (forged(&good)?, "signed with another key"),
        (sign_with_nothing, "signed with nothing"),
        ("nonsense".into(), "no token"),
    ] {
        let code = call(&mut caller(&node, Bearer::new(&token)?), "/esker.v1.Admin/ListTenants").await?;
        ensure!(code == Code::Unauthenticated, "a token that is {what}: {code:?}");
    }
    let code =
        call(&mut caller(&node, Bearer::new(&issuer.sign(&good)?)?), "/esker.v1.Admin/ListTenants").await?;
    ensure!(code == Code::Ok, "the good token: {code:?}");
    node.kill()
}

/// Lines of an audit log with all of these texts.
fn audited<'l>(log: &'l str, texts: &[&str]) -> Vec<&'l str> {
    log.lines().filter(|line| texts.iter().all(|text| line.contains(text))).collect()
}

#[tokio::test]
async fn what_is_refused_is_in_the_audit_log_and_a_flood_of_it_is_a_few_lines() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy = issuer.policy("[tenants.acme]\nsessions = 0\n")?;
    let options = [
        "--no-model",
        "--segment-mib",
        "4",
        "--http",
        "127.0.0.1:0",
        "--policy",
        policy.to_str().context("a path")?,
    ];
    let node = Node::start(&data, &options).await?;
    let mut stranger = Grpc::new(node.channel.clone());
    let token = forged(&Claims::new("acme", &["admin"]))?;
    let mut forger = caller(&node, Bearer::new(&token)?);
    for _ in 0..150 {
        for path in ["/esker.v1.Admin/ListTenants", "/made.up/Method"] {
            ensure!(call(&mut stranger, path).await? == Code::Unauthenticated);
            ensure!(call(&mut forger, path).await? == Code::Unauthenticated);
        }
    }
    let site = node.http.clone().context("an address")?;
    // The page asks without a token, whenever it is opened: that is no refusal.
    for headers in [&[][..], &["authorization: Bearer nonsense"]] {
        let status = web(&site, "GET", "/api/overview", headers, "")?.status;
        ensure!(status == 401, "{status}");
    }
    // A scope whose events are for publishers, and a quota.
    let channel = InterceptedService::new(node.channel.clone(), issuer.token("acme", &["reader", "pinner"])?);
    let follow = v1::SubscribeRequest { scope: v1::Scope::Org.into(), ..Default::default() };
    let open = v1::OpenSessionRequest {
        session: "chat".into(),
        namespace: vec![7; 32].into(),
        tokens: vec![1, 2, 3],
        keep_s: 60,
        user: String::new(),
    };
    for _ in 0..3 {
        let denied = EventsClient::new(channel.clone()).subscribe(follow.clone()).await.err();
        ensure!(denied.is_some_and(|status| status.code() == Code::PermissionDenied));
        let refused = SessionsClient::new(channel.clone()).open_session(open.clone()).await.err();
        ensure!(refused.is_some_and(|status| status.code() == Code::ResourceExhausted));
    }
    let denial = ["acme/engine", "/esker.v1.Events/Subscribe", "role publisher", "denied"];
    let quota =
        ["\"who\":\"acme\"", "\"operation\":\"quota\",\"object\":\"sessions\",\"result\":\"refused\""];
    let unknown = ["127.0.0.1", "unauthenticated"];
    let log = std::fs::read_to_string(data.join("audit.jsonl"))?;
    ensure!(
        audited(&log, &denial).len() == 1 && audited(&log, &quota).len() == 1,
        "at once, and once: {log}"
    );
    ensure!(audited(&log, &unknown).len() == 3, "one for each method, and for a bad token: {log}");
    ensure!(node.stop().await?.success());
    let log = std::fs::read_to_string(data.join("audit.jsonl"))?;
    for (texts, count) in [
        (&denial[..], 2),
        (&quota[..], 2),
        (&[unknown[0], unknown[1], "/esker.v1.Admin/ListTenants"][..], 299),
        (&[unknown[0], unknown[1], "\"unknown\""][..], 299),
    ] {
        let lines = audited(&log, texts);
        ensure!(lines.len() == 2 && lines[1].contains(&format!("\"count\":{count},")), "{texts:?}: {log}");
    }
    ensure!(!log.contains(token.split('.').nth(1).context("claims")?) && !log.contains("chat"), "{log}");
    let checked = output([std::ffi::OsStr::new("audit"), data.as_os_str()]);
    ensure!(checked.status.success(), "{}", text_of(&checked.stderr));
    Ok(())
}

#[tokio::test]
async fn certificates_say_who_calls() -> Result<()> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    let policy =
        issuer.policy("[tenants.acme.service_accounts]\nengine = [\"reader\"]\nops = [\"admin\"]\n")?;
    let (certificate, key) = issuer.server()?;
    let text = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
    let (policy, certificate, key) = (text(&policy)?, text(&certificate)?, text(&key)?);
    let authority = text(&issuer.authority())?;
    let options = [
        "--no-model",
        "--segment-mib",
        "4",
        "--policy",
        &policy,
        "--tls-cert",
        &certificate,
        "--tls-key",
        &key,
        "--tls-client-ca",
        &authority,
    ];
    let node = Node::start(&folder.path().join("data"), &options).await?;
    for (id, code) in [
        (spiffe("acme", "ops"), Code::Ok),
        (spiffe("acme", "engine"), Code::PermissionDenied),
        (spiffe("acme", "stranger"), Code::Unauthenticated),
        (spiffe("other", "ops"), Code::Unauthenticated),
        ("spiffe://elsewhere.example/tenant/acme/sa/ops".into(), Code::Unauthenticated),
    ] {
        let channel = issuer.connect(&node.address, Some(issuer.client(&id)?)).await?;
        let got = call(&mut Grpc::new(channel), "/esker.v1.Admin/ListTenants").await?;
        ensure!(got == code, "{id}: {got:?}, not {code:?}");
    }
    // No certificate, no token: the connection stands, the call does not.
    let channel = issuer.connect(&node.address, None).await?;
    let got = call(&mut Grpc::new(channel.clone()), "/esker.v1.Admin/ListTenants").await?;
    ensure!(got == Code::Unauthenticated, "nobody: {got:?}");
    // A token instead.
    let bearer = issuer.token("acme", &["admin"])?;
    let mut by_token = Grpc::new(InterceptedService::new(channel, bearer.clone()));
    let got = call(&mut by_token, "/esker.v1.Admin/ListTenants").await?;
    ensure!(got == Code::Ok, "a token over TLS: {got:?}");
    // Both: only what both allow.
    let channel = issuer.connect(&node.address, Some(issuer.client(&spiffe("acme", "engine"))?)).await?;
    let mut both = Grpc::new(InterceptedService::new(channel, bearer));
    let got = call(&mut both, "/esker.v1.Admin/ListTenants").await?;
    ensure!(got == Code::PermissionDenied, "a reader's certificate with an admin's token: {got:?}");
    // A certificate of another authority does not get so far.
    let stranger = Issuer::new(&folder.path().join("stranger"))?;
    let refused = match issuer.connect(&node.address, Some(stranger.client(&spiffe("acme", "ops"))?)).await {
        Err(_) => true,
        Ok(channel) => call(&mut Grpc::new(channel), "/esker.v1.Admin/ListTenants").await? != Code::Ok,
    };
    ensure!(refused, "a certificate of another authority was believed");
    // Who says nothing at all is let go.
    let mut silent = std::net::TcpStream::connect(&node.address)?;
    silent.set_read_timeout(Some(Duration::from_secs(20)))?;
    let closed = tokio::task::spawn_blocking(move || std::io::Read::read(&mut silent, &mut [0; 1])).await?;
    ensure!(matches!(closed, Ok(0)), "a connection without a handshake stays: {closed:?}");
    node.kill()
}

#[tokio::test]
async fn beyond_loopback_only_with_tls_and_a_policy() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let data = data.to_str().context("a path")?;
    let output = output(["serve", "--no-model", "--listen", "0.0.0.0:0", "--data", data]);
    ensure!(!output.status.success(), "it listened to the world");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(error.contains("refusing to listen on 0.0.0.0") && error.contains("--tls-cert"), "{error}");
    Ok(())
}

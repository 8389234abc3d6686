//! Promise: what is offered over HTTP is offered to whom it is for, in the shapes that applications know.

use std::ffi::OsStr;

use anyhow::Result;
use esker_tests::{Node, output, scratch, text_of, web};

#[tokio::test]
async fn http_is_off_unless_asked_for_and_stays_on_loopback() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("a")).await?;
    assert_eq!(node.http, None);
    node.kill()?;
    let data = folder.path().join("b");
    let args = ["serve", "--no-model", "--http", "0.0.0.0:0", "--listen", "127.0.0.1:0", "--data"];
    let refused = output(args.iter().map(OsStr::new).chain([data.as_os_str()]));
    let text = text_of(&refused.stderr);
    assert!(!refused.status.success() && text.contains("refusing to listen on 0.0.0.0:0"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_node_answers_probes_and_no_page_of_another_origin() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--no-model", "--http", "127.0.0.1:0"]).await?;
    let http = node.http.clone().unwrap_or_default();
    let alive = web(&http, "GET", "/healthz", &[], "")?;
    assert_eq!((alive.status, alive.body.as_str()), (200, r#"{"status":"serving"}"#));
    for header in ["host: example.com", "origin: https://example.com"] {
        assert_eq!(web(&http, "GET", "/healthz", &[header], "")?.status, 403, "{header}");
    }
    let nothing = web(&http, "GET", "/nothing", &[], "")?;
    assert_eq!(nothing.status, 404);
    assert!(nothing.body.contains("\"message\":\"there is nothing at /nothing\""), "{}", nothing.body);
    assert!(node.stop().await?.success());
    Ok(())
}

//! The tokens that a conversation comes to.

use esker_prefix::TokenId;
use esker_proto::MAX_TEXT_BYTES;

use super::Site;
use super::completion::engine;
use super::failure::Failure;
use crate::chat_template::conversation::Conversation;
use crate::principal::Principal;

/// See the module. On a thread of its own: a long conversation takes a while to tokenize.
pub(super) async fn prompt(
    site: &Site,
    principal: &Principal,
    conversation: Conversation,
) -> Result<Vec<TokenId>, Failure> {
    let (site, tenant) = (site.clone(), principal.tenant.clone());
    let mut conversation = conversation;
    let work = tokio::task::spawn_blocking(move || {
        let unusable = |error: &dyn std::fmt::Display| Failure::invalid(error.to_string()).about("messages");
        let engine = engine(&site)?;
        site.replay.recall_calls(&tenant, &mut conversation);
        let parts = engine.loaded.template.render(&conversation).map_err(|refused| unusable(&refused))?;
        let bytes: usize = parts.iter().map(|part| part.as_str().len()).sum();
        if bytes > MAX_TEXT_BYTES {
            let long = format!("the conversation has {bytes} bytes of text, the limit is {MAX_TEXT_BYTES}");
            return Err(Failure::invalid(long).about("messages"));
        }
        site.replay.tokens(&tenant, &engine.loaded.tokenizer, &parts).map_err(|error| unusable(&error))
    });
    work.await.map_err(|error| {
        tracing::error!(%error, "a prompt could not be made");
        Failure::broken("the request failed inside the node; its log says why")
    })?
}

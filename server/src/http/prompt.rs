//! The tokens that a conversation comes to.

use esker_prefix::TokenId;
use esker_proto::MAX_TEXT_BYTES;

use super::Site;
use super::completion::engine;
use super::failure::Failure;
use crate::chat_template::conversation::Conversation;
use crate::replay::Owner;

/// See the module. On a thread of its own: a long conversation takes a while to tokenize.
pub(super) async fn prompt(
    site: &Site,
    owner: &Owner,
    conversation: Conversation,
) -> Result<Vec<TokenId>, Failure> {
    let (site, owner) = (site.clone(), owner.clone());
    let mut conversation = conversation;
    let work = tokio::task::spawn_blocking(move || {
        let unusable = |error: &dyn std::fmt::Display| Failure::invalid(error.to_string()).about("messages");
        let engine = engine(&site)?;
        site.node.replay.recall_calls(&owner, &mut conversation);
        let parts = engine.loaded.template.render(&conversation).map_err(|refused| unusable(&refused))?;
        let bytes: usize = parts.iter().map(|part| part.as_str().len()).sum();
        if bytes > MAX_TEXT_BYTES {
            let long = format!("the conversation has {bytes} bytes of text, the limit is {MAX_TEXT_BYTES}");
            return Err(Failure::invalid(long).about("messages"));
        }
        site.node.replay.tokens(&owner, &engine.loaded.tokenizer, &parts).map_err(|error| unusable(&error))
    });
    work.await.map_err(|error| {
        tracing::error!(%error, "a prompt could not be made");
        Failure::broken("the request failed inside the node; its log says why")
    })?
}

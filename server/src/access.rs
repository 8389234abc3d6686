//! Who may call what: one row for every method. A method without a row is denied, and a test fails.

use crate::principal::Role;

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Everyone, unasked: what a load balancer probes.
    Anyone,
    /// Every principal.
    Known,
    /// A principal with one of these roles. The handler asks for more where the object of the call needs it.
    Roles(&'static [Role]),
}

use Role::{Admin, BillingReader, Pinner, Publisher, Reader, Writer};

const RULES: &[(&str, Rule)] = &[
    ("/grpc.health.v1.Health/Check", Rule::Anyone),
    ("/grpc.health.v1.Health/List", Rule::Anyone),
    ("/grpc.health.v1.Health/Watch", Rule::Anyone),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Rule::Known),
    ("/esker.v1.PrefixCache/RegisterNamespace", Rule::Roles(&[Writer, Publisher])),
    ("/esker.v1.PrefixCache/Lookup", Rule::Roles(&[Reader])),
    ("/esker.v1.PrefixCache/LookupMany", Rule::Roles(&[Reader])),
    ("/esker.v1.PrefixCache/Fetch", Rule::Roles(&[Reader])),
    ("/esker.v1.PrefixCache/Put", Rule::Roles(&[Writer, Publisher])),
    ("/esker.v1.PrefixCache/Settle", Rule::Roles(&[Reader])),
    ("/esker.v1.PrefixCache/Release", Rule::Roles(&[Reader])),
    ("/esker.v1.Decoder/Describe", Rule::Roles(&[Reader])),
    ("/esker.v1.Decoder/Tokenize", Rule::Roles(&[Reader])),
    ("/esker.v1.Decoder/Generate", Rule::Roles(&[Reader])),
    ("/esker.v1.Sessions/OpenSession", Rule::Roles(&[Pinner])),
    ("/esker.v1.Sessions/ExtendSession", Rule::Roles(&[Pinner])),
    ("/esker.v1.Sessions/RenewSession", Rule::Roles(&[Pinner])),
    ("/esker.v1.Sessions/CloseSession", Rule::Roles(&[Pinner])),
    ("/esker.v1.Sessions/ListSessions", Rule::Roles(&[Pinner, Reader])),
    ("/esker.v1.Warmup/SubmitWarmup", Rule::Roles(&[Writer, Publisher])),
    ("/esker.v1.Warmup/GetWarmup", Rule::Roles(&[Writer, Publisher, Reader])),
    ("/esker.v1.Warmup/WatchWarmup", Rule::Roles(&[Writer, Publisher, Reader])),
    ("/esker.v1.Warmup/ListWarmups", Rule::Roles(&[Writer, Publisher, Reader])),
    ("/esker.v1.Warmup/CancelWarmup", Rule::Roles(&[Writer, Publisher])),
    ("/esker.v1.Usage/QueryUsage", Rule::Roles(&[BillingReader, Reader])),
    ("/esker.v1.Usage/ExportUsage", Rule::Roles(&[BillingReader])),
    ("/esker.v1.Local/FetchLocal", Rule::Roles(&[Reader])),
    ("/esker.v1.Local/PutLocal", Rule::Roles(&[Writer, Publisher])),
    ("/esker.v1.Events/Subscribe", Rule::Roles(&[Reader])),
    ("/esker.v1.Admin/EraseTenant", Rule::Roles(&[Admin])),
    ("/esker.v1.Admin/RevokeWriter", Rule::Roles(&[Admin])),
    ("/esker.v1.Admin/ListTenants", Rule::Roles(&[Admin])),
];

/// The rule of a method, by its path.
pub(crate) fn rule(path: &str) -> Option<Rule> {
    RULES.iter().find(|(method, _)| *method == path).map(|(_, rule)| *rule)
}

/// The name of a method whose path may be anything that a caller sends: itself, if there is a rule for it.
pub(crate) fn method(path: &str) -> &'static str {
    RULES.iter().find(|(method, _)| *method == path).map_or("unknown", |(method, _)| method)
}

/// What a caller who was denied needs.
pub(crate) fn missing(path: &str) -> String {
    match rule(path) {
        Some(Rule::Roles(roles)) => needs(path, roles),
        _ => format!("{path} is open to nobody on this node"),
    }
}

/// The same for a path with these roles.
pub(crate) fn needs(path: &str, roles: &[Role]) -> String {
    let names = roles.iter().filter_map(|role| Some(serde_json::to_value(role).ok()?.as_str()?.to_owned()));
    format!("{path} needs the role {}", names.collect::<Vec<_>>().join(" or "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use prost_types::FileDescriptorSet;

    #[test]
    fn every_method_has_a_row() {
        let set = FileDescriptorSet::decode(esker_proto::v1::FILE_DESCRIPTOR_SET).unwrap();
        let mut methods = Vec::new();
        for file in &set.file {
            for service in &file.service {
                let name = format!("/{}.{}", file.package(), service.name());
                methods.extend(service.method.iter().map(|method| format!("{name}/{}", method.name())));
            }
        }
        assert!(methods.len() > 15);
        for method in methods {
            assert!(rule(&method).is_some(), "{method} has no row in access.rs");
        }
        assert_eq!(rule("/esker.v1.PrefixCache/Drop"), None);
    }
}

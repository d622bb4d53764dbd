//! `query-qmp-schema`: every command and event, and the types of what they take and give, as QEMU's introspection has
//! them. Types have their own names here, which as in QEMU are nobody's to rely on.
use super::answers::{SchemaInfo, SchemaMember};
use super::shape::{Member, Shape};
use std::collections::BTreeMap;

/// Commands, events and types, collected.
#[derive(Default)]
pub(super) struct Schema {
    things: Vec<SchemaInfo>,
    types: BTreeMap<String, SchemaInfo>,
}

impl Schema {
    pub(super) fn command(&mut self, name: &str, takes: &Shape, gives: &Shape) {
        let (takes, gives) = (self.name_of(takes), self.name_of(gives));
        self.things.push(SchemaInfo { arg_type: Some(takes), ret_type: Some(gives), ..entry(name, "command") });
    }

    pub(super) fn event(&mut self, name: &str, says: &Shape) {
        let says = self.name_of(says);
        self.things.push(SchemaInfo { arg_type: Some(says), ..entry(name, "event") });
    }

    /// Everything, the types last.
    pub(super) fn into_entries(self) -> Vec<SchemaInfo> {
        self.things.into_iter().chain(self.types.into_values()).collect()
    }

    /// The name of a type, which is entered where it was not yet.
    fn name_of(&mut self, shape: &Shape) -> String {
        let info = match shape {
            Shape::Text => builtin("str", "string"),
            Shape::Whole => builtin("int", "int"),
            Shape::Number => builtin("number", "number"),
            Shape::Flag => builtin("bool", "boolean"),
            Shape::Null => builtin("null", "null"),
            Shape::Any => builtin("any", "value"),
            Shape::List(inside) => {
                let inside = self.name_of(inside);
                SchemaInfo { element_type: Some(inside.clone()), ..entry(&format!("[{inside}]"), "array") }
            }
            Shape::Word { name, words } => {
                let word = |word: &&str| SchemaMember { name: (*word).to_owned(), ..SchemaMember::default() };
                SchemaInfo {
                    members: Some(words.iter().map(word).collect()),
                    values: Some(words.iter().map(|word| (*word).to_owned()).collect()),
                    ..entry(name, "enum")
                }
            }
            Shape::Object { name, members } => {
                let members = members.iter().map(|member| self.member(member)).collect();
                SchemaInfo { members: Some(members), ..entry(name, "object") }
            }
        };
        let name = info.name.clone();
        let before = self.types.insert(name.clone(), info);
        assert!(before.is_none_or(|before| before == self.types[&name]), "two types are called {name}");
        name
    }

    fn member(&mut self, member: &Member) -> SchemaMember {
        SchemaMember {
            name: member.name.to_owned(),
            kind: Some(self.name_of(&member.shape)),
            default: member.optional.then_some(()),
        }
    }
}

fn builtin(name: &str, json_type: &str) -> SchemaInfo {
    SchemaInfo { json_type: Some(json_type.to_owned()), ..entry(name, "builtin") }
}

fn entry(name: &str, meta_type: &str) -> SchemaInfo {
    SchemaInfo { name: name.to_owned(), meta_type: meta_type.to_owned(), ..SchemaInfo::default() }
}

//! What a type looks like in JSON, learnt from the type's own way of being read.
//!
//! The reader of a type asks for its members by name and for each value by its kind. So it is handed the simplest
//! values that it takes, and what it asks for is noted. A member is optional where a second reading without it
//! succeeds. There is no other description of the commands' arguments that could differ from what is parsed.
use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use std::fmt;

/// What a value looks like.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Shape {
    Text,
    Whole,
    /// With a fraction.
    Number,
    Flag,
    Null,
    /// Whatever there is.
    Any,
    List(Box<Shape>),
    /// One of some words.
    Word {
        name: &'static str,
        words: &'static [&'static str],
    },
    Object {
        name: &'static str,
        members: Vec<Member>,
    },
}

/// A member of an object.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Member {
    pub name: &'static str,
    pub shape: Shape,
    pub optional: bool,
}

/// The shape of `T`.
pub(super) fn shape<T: DeserializeOwned>() -> Shape {
    let (mut shape, count) = read::<T>(None).expect("the simplest values of each kind are taken");
    let is_optional: Vec<bool> = (0..count).map(|number| read::<T>(Some(number)).is_ok()).collect();
    note_optional(&mut shape, &mut is_optional.into_iter());
    shape
}

/// Reads a `T`, without the member of this number where there is one. Members are numbered as they come, the outer
/// one before those inside it. Returns the shape, and how many members there were.
fn read<T: DeserializeOwned>(without: Option<usize>) -> Result<(Shape, usize), Refused> {
    let mut shape = Shape::Null;
    let mut count = 0;
    T::deserialize(Reader { shape: &mut shape, count: &mut count, without })?;
    Ok((shape, count))
}

fn note_optional(shape: &mut Shape, is_optional: &mut impl Iterator<Item = bool>) {
    match shape {
        Shape::List(inside) => note_optional(inside, is_optional),
        Shape::Object { members, .. } => {
            for member in members {
                member.optional = is_optional.next().expect("one for each member");
                note_optional(&mut member.shape, is_optional);
            }
        }
        _ => {}
    }
}

/// A reading that did not succeed: something was missing.
#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl de::Error for Refused {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// Hands out one value, and notes what was asked for.
struct Reader<'a> {
    shape: &'a mut Shape,
    count: &'a mut usize,
    without: Option<usize>,
}

impl Reader<'_> {
    fn note(self, shape: Shape) {
        *self.shape = shape;
    }
}

/// Values of one kind: the method of the reader, its shape, the method of the visitor, the value.
macro_rules! values {
    ($($ask:ident, $shape:expr, $give:ident, $value:expr;)*) => {
        $(fn $ask<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
            self.note($shape);
            visitor.$give($value)
        })*
    };
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Refused;

    values! {
        deserialize_bool, Shape::Flag, visit_bool, false;
        deserialize_u8, Shape::Whole, visit_u64, 0;
        deserialize_u16, Shape::Whole, visit_u64, 0;
        deserialize_u32, Shape::Whole, visit_u64, 0;
        deserialize_u64, Shape::Whole, visit_u64, 0;
        deserialize_f64, Shape::Number, visit_f64, 0.0;
        deserialize_str, Shape::Text, visit_str, "";
        deserialize_string, Shape::Text, visit_str, "";
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.note(Shape::Any);
        visitor.visit_unit()
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.note(Shape::Null);
        visitor.visit_unit()
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        let mut inside = Shape::Null;
        let mut once = Some(Reader { shape: &mut inside, count: self.count, without: self.without });
        let value = visitor.visit_seq(Once(&mut once))?;
        *self.shape = Shape::List(Box::new(inside));
        Ok(value)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        let mut members = Vec::new();
        let given = Members { fields, members: &mut members, count: self.count, without: self.without };
        let value = visitor.visit_map(given)?;
        *self.shape = Shape::Object { name, members };
        Ok(value)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.note(Shape::Word { name, words });
        visitor.visit_enum(First(words[0]))
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 char bytes byte_buf unit_struct newtype_struct tuple tuple_struct map
        identifier ignored_any
    }
}

/// A list of one.
struct Once<'a, 'b>(&'a mut Option<Reader<'b>>);

impl<'de> SeqAccess<'de> for Once<'_, '_> {
    type Error = Refused;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Refused> {
        self.0.take().map(|reader| seed.deserialize(reader)).transpose()
    }
}

/// Each member in turn.
struct Members<'a> {
    fields: &'static [&'static str],
    members: &'a mut Vec<Member>,
    count: &'a mut usize,
    without: Option<usize>,
}

impl<'de> MapAccess<'de> for Members<'_> {
    type Error = Refused;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refused> {
        loop {
            let Some((name, rest)) = self.fields.split_first() else { return Ok(None) };
            self.fields = rest;
            let number = *self.count;
            *self.count += 1;
            if self.without != Some(number) {
                self.members.push(Member { name, shape: Shape::Null, optional: false });
                return seed.deserialize(StrDeserializer::new(name)).map(Some);
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Refused> {
        let member = self.members.last_mut().expect("its name comes first");
        seed.deserialize(Reader { shape: &mut member.shape, count: self.count, without: self.without })
    }
}

/// The first of some words.
struct First(&'static str);

impl<'de> EnumAccess<'de> for First {
    type Error = Refused;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Refused> {
        Ok((seed.deserialize(StrDeserializer::new(self.0))?, self))
    }
}

/// Words stand for themselves: there is nothing inside.
impl<'de> VariantAccess<'de> for First {
    type Error = Refused;

    fn unit_variant(self) -> Result<(), Refused> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Refused> {
        Err(de::Error::custom("a word with something inside"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Refused> {
        Err(de::Error::custom("a word with something inside"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Refused> {
        Err(de::Error::custom("a word with something inside"))
    }
}

#[cfg(test)]
mod tests {
    use super::{Member, Shape, shape};
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    #[expect(dead_code, reason = "read, and never looked at")]
    struct Outer {
        inner_one: Inner,
        #[serde(default)]
        inner_two: Inner,
        words: Vec<Word>,
        number: Option<u32>,
        #[serde(rename = "type")]
        kind: serde_json::Value,
    }

    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Inner {
        flag: bool,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Word {
        OneWord,
        #[serde(rename = "2")]
        Two,
    }

    fn member(name: &'static str, shape: Shape, optional: bool) -> Member {
        Member { name, shape, optional }
    }

    #[test]
    fn a_type_is_what_it_reads() {
        let inner = Shape::Object { name: "Inner", members: vec![member("flag", Shape::Flag, true)] };
        let word = Shape::Word { name: "Word", words: &["one-word", "2"] };
        let members = vec![
            member("inner-one", inner.clone(), false),
            member("inner-two", inner, true),
            member("words", Shape::List(Box::new(word)), false),
            member("number", Shape::Whole, true),
            member("type", Shape::Any, false),
        ];
        assert_eq!(shape::<Outer>(), Shape::Object { name: "Outer", members });
        let words: Vec<Word> = serde_json::from_str(r#"["one-word", "2"]"#).expect("both words");
        assert!(matches!(words[..], [Word::OneWord, Word::Two]));
    }
}

//! Floating-point numbers in JSON files. JSON has no NaN and no infinity: they are written as the strings "NaN",
//! "Infinity" and "-Infinity", which Python's `float` and JavaScript's `Number` accept, too. A number that is read has
//! the same bits as the one that was written.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::value::RawValue;

/// A number that need not be finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Float(pub f64);

impl Serialize for Float {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            finite if finite.is_finite() => output.serialize_f64(finite),
            nan if nan.is_nan() => output.serialize_str("NaN"),
            infinite => output.serialize_str(if infinite > 0.0 { "Infinity" } else { "-Infinity" }),
        }
    }
}

impl<'de> Deserialize<'de> for Float {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        // Parsed from its text by Rust, because `serde_json` may read the last bit of a long number wrong.
        let raw: Box<RawValue> = Deserialize::deserialize(input)?;
        let value = match raw.get() {
            // Older versions wrote null.
            "null" | "\"NaN\"" => Some(f64::NAN),
            "\"Infinity\"" => Some(f64::INFINITY),
            "\"-Infinity\"" => Some(f64::NEG_INFINITY),
            text => text.parse().ok(),
        };
        value.map(Self).ok_or_else(|| de::Error::custom(format!("{raw} is not a number")))
    }
}

/// Serialisation of `f64` fields.
pub(crate) mod float {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(value: &f64, output: S) -> Result<S::Ok, S::Error> {
        Float(*value).serialize(output)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<f64, D::Error> {
        Float::deserialize(input).map(|value| value.0)
    }
}

/// Serialisation of `BTreeMap<String, f64>` fields.
pub(crate) mod by_name {
    use super::*;
    use std::collections::BTreeMap;

    pub(crate) fn serialize<S: Serializer>(
        values: &BTreeMap<String, f64>,
        output: S,
    ) -> Result<S::Ok, S::Error> {
        output.collect_map(values.iter().map(|(name, value)| (name, Float(*value))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        input: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let values = BTreeMap::<String, Float>::deserialize(input)?;
        Ok(values.into_iter().map(|(name, value)| (name, value.0)).collect())
    }
}

/// Serialisation of `Option<f64>` fields; none is `null`.
pub(crate) mod optional {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(value: &Option<f64>, output: S) -> Result<S::Ok, S::Error> {
        value.map(Float).serialize(output)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<Float>::deserialize(input)?.map(|value| value.0))
    }
}

/// Serialisation of fields with a number and a step.
pub(crate) mod at_step {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(
        value: &Option<(f64, usize)>,
        output: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(|(value, step)| (Float(value), step)).serialize(output)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<(f64, usize)>, D::Error> {
        Ok(Option::<(Float, usize)>::deserialize(input)?.map(|(value, step)| (value.0, step)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct All {
        #[serde(with = "float")]
        one: f64,
        #[serde(default, with = "optional")]
        maybe: Option<f64>,
        #[serde(default, with = "at_step")]
        best: Option<(f64, usize)>,
    }

    fn same(a: f64, b: f64) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    fn round_trip(value: f64) {
        let all = All { one: value, maybe: Some(value), best: Some((value, 7)) };
        let text = serde_json::to_string(&all).unwrap();
        for back in [
            serde_json::from_str::<All>(&text).unwrap(),
            serde_json::from_value::<All>(serde_json::from_str(&text).unwrap()).unwrap(),
        ] {
            // `Value` has parsed the number, so its last bits may be wrong.
            let few = 8.0 * f64::EPSILON * value.abs().max(f64::MIN_POSITIVE);
            let close = |a: f64| same(a, value) || (a - value).abs() <= few;
            assert!(close(back.one) && close(back.maybe.unwrap()) && close(back.best.unwrap().0), "{text}");
        }
        let back: All = serde_json::from_str(&text).unwrap();
        assert!(same(back.one, value) && same(back.maybe.unwrap(), value), "{text}");
        assert!(same(back.best.unwrap().0, value) && back.best.unwrap().1 == 7, "{text}");
    }

    #[test]
    fn numbers_that_json_lacks_are_kept() {
        let most = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, f64::MAX, f64::MIN_POSITIVE, 5e-324];
        most.into_iter().for_each(round_trip);
        let nothing: All = serde_json::from_str("{\"one\":1}").unwrap();
        assert_eq!((nothing.one, nothing.maybe, nothing.best), (1.0, None, None));
        let older: All = serde_json::from_str("{\"one\":null,\"best\":[null,3]}").unwrap();
        assert!(older.one.is_nan() && older.best.unwrap().0.is_nan());
        for wrong in ["\"x\"", "[]", "{}", "true", "\"nan\""] {
            assert!(serde_json::from_str::<All>(&format!("{{\"one\":{wrong}}}")).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_bit_is_kept(bits: u64) {
            round_trip(f64::from_bits(bits));
        }
    }
}

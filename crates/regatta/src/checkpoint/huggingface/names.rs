//! Maps our names of tensors to those of GPT-2. Linear weights are `[input, output]` in both (GPT-2's `Conv1D`).

use crate::models::GptConfig;

/// A tensor of a GPT under both names.
pub(super) struct Named {
    /// Its path in our model.
    pub ours: String,
    /// Its name as `GPT2LMHeadModel` saves it.
    pub theirs: String,
    pub shape: Vec<usize>,
    /// Whether only models with biases have it.
    pub bias: bool,
}

/// All tensors of a GPT over `vocab` tokens.
pub(super) fn tensors(gpt: &GptConfig, vocab: usize) -> Vec<Named> {
    let width = gpt.embed;
    let mut all = vec![];
    let mut add = |ours: String, theirs: String, shape: &[usize], bias| {
        all.push(Named { ours, theirs, shape: shape.to_vec(), bias });
    };
    add("tokens".into(), "transformer.wte.weight".into(), &[vocab, width], false);
    add("positions".into(), "transformer.wpe.weight".into(), &[gpt.context, width], false);
    for layer in 0..gpt.layers {
        let ours = |name: &str| format!("layers.{layer}.{name}");
        let theirs = |name: &str| format!("transformer.h.{layer}.{name}");
        for (our, their) in [("norm1", "ln_1"), ("norm2", "ln_2")] {
            add(ours(&format!("{our}.gamma")), theirs(&format!("{their}.weight")), &[width], false);
            add(ours(&format!("{our}.beta")), theirs(&format!("{their}.bias")), &[width], true);
        }
        for (our, their, input, output) in [
            ("attention.qkv", "attn.c_attn", width, 3 * width),
            ("attention.out", "attn.c_proj", width, width),
            ("up", "mlp.c_fc", width, 4 * width),
            ("down", "mlp.c_proj", 4 * width, width),
        ] {
            add(ours(&format!("{our}.weight")), theirs(&format!("{their}.weight")), &[input, output], false);
            add(ours(&format!("{our}.bias")), theirs(&format!("{their}.bias")), &[output], true);
        }
    }
    add("norm.gamma".into(), "transformer.ln_f.weight".into(), &[width], false);
    add("norm.beta".into(), "transformer.ln_f.bias".into(), &[width], true);
    if !gpt.tied {
        add("head".into(), "lm_head.weight".into(), &[vocab, width], false);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::ModelConfig;
    use crate::params::Placement;

    #[test]
    fn these_are_the_tensors_of_our_model() {
        for (bias, tied) in [(true, true), (false, false)] {
            let gpt =
                GptConfig { layers: 2, heads: 2, embed: 8, context: 4, bias, tied, ..GptConfig::default() };
            let mut named: Vec<_> = tensors(&gpt, 11)
                .into_iter()
                .filter(|tensor| bias || !tensor.bias)
                .map(|tensor| (tensor.ours, tensor.shape))
                .collect();
            let params = ModelConfig::new(gpt).describe(11, Placement::whole()).unwrap();
            let mut found: Vec<_> =
                params.into_iter().map(|param| (param.spec.path, param.spec.shape)).collect();
            named.sort();
            found.sort();
            assert_eq!(named, found);
        }
    }
}

//! Learns the merges of byte-pair encoding (Sennrich et al. 2016). The time grows with the text, not with the square
//! of its longest word.
//!
//! The merges are the same as those of the crate `tokenizers`. For each merge, that crate scans the whole of every
//! word with the pair; text without spaces is one word, so each merge scans the whole text. Here a merge visits only
//! the places of its pair.

use ahash::AHashMap;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Two adjacent tokens.
type Pair = (u32, u32);

/// No place or no token: beyond the end of a word, or a token that was merged into the one before it.
const NONE: u32 = u32::MAX;

/// Tokens by id, and the merged pairs in their order. If a pair occurs twice, its later position counts.
#[derive(Debug, PartialEq)]
pub(super) struct Learned {
    pub tokens: Vec<Vec<u8>>,
    pub merges: Vec<Pair>,
}

/// A pair in the queue: how often it occurred when it was queued, and in which words.
struct Entry {
    count: i64,
    pair: Pair,
    words: Vec<u32>,
}

impl Ord for Entry {
    /// The most frequent pair first; of equally frequent ones, the one with the smallest ids.
    fn cmp(&self, other: &Self) -> Ordering {
        self.count.cmp(&other.count).then_with(|| other.pair.cmp(&self.pair))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

/// All words one after the other, as doubly linked lists of tokens.
#[derive(Default)]
struct Words {
    token: Vec<u32>,
    before: Vec<u32>,
    after: Vec<u32>,
    /// The word of each place.
    word: Vec<u32>,
    /// How often each word occurs.
    counts: Vec<i64>,
}

impl Words {
    fn push(&mut self, tokens: impl Iterator<Item = u32>, count: u64) {
        let word = self.counts.len() as u32;
        self.counts.push(count as i64);
        let first = self.token.len() as u32;
        for token in tokens {
            let at = self.token.len() as u32;
            let before = if at == first { NONE } else { at - 1 };
            if let Some(last) = self.after.get_mut(before as usize) {
                *last = at;
            }
            self.token.push(token);
            self.before.push(before);
            self.after.push(NONE);
            self.word.push(word);
        }
    }

    /// The pair that begins at `at`.
    fn pair(&self, at: u32) -> Option<Pair> {
        let second = *self.token.get(self.after[at as usize] as usize)?;
        Some((self.token[at as usize], second))
    }
}

/// Places of pairs. They are ascending unless several merges created the pair.
type Places = AHashMap<Pair, Vec<u32>>;

/// Learns from `words`, each with the number of times that it occurs, until there are `vocab_size` tokens or no pair
/// occurs `min_count` times. The first 256 tokens are the bytes in the order of `alphabet`. `progress` gets the number
/// of tokens after each merge.
///
/// # Errors
/// The words have more than 4 GiB in all, so that places do not fit 32 bits.
pub(super) fn learn<'a>(
    words: impl Iterator<Item = (&'a [u8], u64)>,
    alphabet: &[u8; 256],
    vocab_size: usize,
    min_count: i64,
    progress: &mut dyn FnMut(usize),
) -> Result<Learned, String> {
    let mut id_of = [0u32; 256];
    for (id, &byte) in alphabet.iter().enumerate() {
        id_of[usize::from(byte)] = id as u32;
    }
    let mut tokens: Vec<Vec<u8>> = alphabet.iter().map(|&byte| vec![byte]).collect();
    let mut ids: AHashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();

    let mut all = Words::default();
    for (word, count) in words {
        if all.token.len() + word.len() >= NONE as usize {
            return Err("there are more than 4 GiB of different words to learn from".into());
        }
        all.push(word.iter().map(|&byte| id_of[usize::from(byte)]), count);
    }

    let mut counts: AHashMap<Pair, i64> = AHashMap::new();
    let mut places = Places::new();
    for at in 0..all.token.len() as u32 {
        if let Some(pair) = all.pair(at) {
            *counts.entry(pair).or_default() += all.counts[all.word[at as usize] as usize];
            places.entry(pair).or_default().push(at);
        }
    }
    let mut queue: BinaryHeap<Entry> = places
        .iter()
        .map(|(&pair, places)| Entry { count: counts[&pair], pair, words: words_of(&all, places) })
        .collect();

    let mut merges = vec![];
    // By word: the number of the last merge that changes it.
    let mut last_merge = vec![0u64; all.counts.len()];
    let mut number = 0;
    let mut created = Places::new();
    while tokens.len() < vocab_size {
        let Some(mut top) = queue.pop() else { break };
        // Later merges may have reduced its count.
        let now = counts[&top.pair];
        if top.count != now {
            top.count = now;
            queue.push(top);
            continue;
        }
        if top.count < min_count.max(1) {
            break;
        }
        let (first, second) = top.pair;
        let spelt = [&tokens[first as usize][..], &tokens[second as usize]].concat();
        // Other merges may have created a token of the same bytes before.
        let merged = *ids.entry(spelt).or_insert_with_key(|spelt| {
            tokens.push(spelt.clone());
            tokens.len() as u32 - 1
        });
        merges.push(top.pair);

        number += 1;
        top.words.iter().for_each(|&word| last_merge[word as usize] = number);
        let mut here = places.remove(&top.pair).unwrap_or_default();
        // A pair that several merges created has an entry for each, and each entry changes only its own words.
        let mut others = vec![];
        here.retain(|&at| {
            let own = last_merge[all.word[at as usize] as usize] == number;
            if !own {
                others.push(at);
            }
            own
        });
        if !others.is_empty() {
            places.insert(top.pair, others);
        }
        // From left to right, because the order decides which of overlapping pairs are merged.
        here.sort();
        for at in here {
            merge(&mut all, at, top.pair, merged, &mut counts, &mut created);
        }
        for (pair, found) in created.drain() {
            let count = counts[&pair];
            if count > 0 {
                queue.push(Entry { count, pair, words: words_of(&all, &found) });
                places.entry(pair).or_default().extend(found);
            }
        }
        progress(tokens.len());
    }
    Ok(Learned { tokens, merges })
}

/// Replaces `pair` at `at` by `merged`, if it still is there, and updates the counts of neighbouring pairs.
fn merge(
    all: &mut Words,
    at: u32,
    pair: Pair,
    merged: u32,
    counts: &mut AHashMap<Pair, i64>,
    created: &mut Places,
) {
    let i = at as usize;
    if all.token[i] == NONE || all.pair(at) != Some(pair) {
        return;
    }
    let count = all.counts[all.word[i] as usize];
    let (removed, before) = (all.after[i], all.before[i]);
    let after = all.after[removed as usize];
    let mut change = |pair: Pair, by: i64| *counts.entry(pair).or_default() += by;
    if before != NONE {
        let neighbour = all.token[before as usize];
        change((neighbour, pair.0), -count);
        change((neighbour, merged), count);
        created.entry((neighbour, merged)).or_default().push(before);
    }
    all.token[i] = merged;
    all.token[removed as usize] = NONE;
    all.after[i] = after;
    if after != NONE {
        all.before[after as usize] = at;
        let neighbour = all.token[after as usize];
        change((pair.1, neighbour), -count);
        change((merged, neighbour), count);
        created.entry((merged, neighbour)).or_default().push(at);
    }
}

/// The words of `places`, each once if the places are ascending.
fn words_of(all: &Words, places: &[u32]) -> Vec<u32> {
    let mut words: Vec<u32> = places.iter().map(|&at| all.word[at as usize]).collect();
    words.dedup();
    words.shrink_to_fit();
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::tokenizer::Trainer;

    /// The vocabulary and the merges, by rank, that the crate's trainer learns from `words`.
    fn by_the_crate(words: &[(String, u64)], vocab_size: usize) -> (BTreeMap<String, u32>, Vec<String>) {
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        // A word with a count is repeated that many times.
        let list: Vec<String> = words
            .iter()
            .flat_map(|(word, count)| std::iter::repeat_n(word.clone(), *count as usize))
            .collect();
        trainer.feed(list.iter(), |word| Ok(vec![word.to_string()])).unwrap();
        let mut model = BPE::default();
        trainer.train(&mut model).unwrap();
        let json: serde_json::Value = serde_json::to_value(&model).unwrap();
        let merges = json["merges"]
            .as_array()
            .unwrap()
            .iter()
            .map(|merge| format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()));
        (model.get_vocab().into_iter().collect(), merges.collect())
    }

    fn by_us(words: &[(String, u64)], vocab_size: usize) -> (BTreeMap<String, u32>, Vec<String>) {
        // The characters of these words are written as themselves.
        let (alphabet, spell) = super::super::bpe::alphabet();
        let words = words.iter().map(|(word, count)| (word.as_bytes(), *count));
        let learned = learn(words, &alphabet, vocab_size, 2, &mut |_| {}).unwrap();
        let spelt: Vec<String> = learned
            .tokens
            .iter()
            .map(|token| token.iter().map(|&b| spell[usize::from(b)]).collect())
            .collect();
        let last: BTreeMap<Pair, usize> = learned.merges.iter().copied().zip(0..).collect();
        let mut merges: Vec<(usize, Pair)> = last.into_iter().map(|(pair, rank)| (rank, pair)).collect();
        merges.sort();
        let merges =
            merges.iter().map(|(_, (a, b))| format!("{} {}", spelt[*a as usize], spelt[*b as usize]));
        let merges = merges.collect();
        (spelt.into_iter().zip(0..).collect(), merges)
    }

    fn counted(words: Vec<String>) -> Vec<(String, u64)> {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        words
            .into_iter()
            .filter(|word| !word.is_empty())
            .for_each(|word| *counts.entry(word).or_default() += 1);
        counts.into_iter().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Few letters cause ties, overlapping pairs, and tokens that several merges create.
        #[test]
        fn merges_are_those_of_the_crate(
            words in prop::collection::vec("[ab]{1,30}|[abc]{1,12}|a{1,20}|[ACGT]{20,200}|(abc|bca|ab){1,9}", 1..40),
            more in 0usize..120,
        ) {
            let words = counted(words);
            prop_assert_eq!(by_us(&words, 256 + more), by_the_crate(&words, 256 + more));
        }
    }

    #[test]
    fn one_word_of_a_whole_text_gives_what_the_crate_gives() {
        let mut state = 1u64;
        let word: String = (0..20_000)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                char::from(b"ACGT"[(state >> 33) as usize % 4])
            })
            .collect();
        let words = vec![(word, 1)];
        assert_eq!(by_us(&words, 1500), by_the_crate(&words, 1500));
    }

    #[test]
    fn nothing_to_learn_from_leaves_the_bytes() {
        assert_eq!(by_us(&[], 300).1.len(), 0);
        assert_eq!(by_us(&counted(vec!["abcdef".into()]), 300).0.len(), 256);
    }
}

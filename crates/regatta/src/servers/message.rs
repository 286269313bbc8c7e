//! Messages between workers and parameter servers: what their tags say.

/// What a message is. Numbers of units follow the order of the unit's elements, of which a server has its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Worker to server: gradients of a unit.
    Push = 1,
    /// Worker to server: apply what this worker has pushed (in `sync` mode, what all have). See [`Commit`].
    Commit = 2,
    /// Worker to server: forget what was pushed in this step.
    Discard = 3,
    /// First worker to server: parameters of a unit, before the first step. Server to worker: after an update.
    Parameters = 4,
    /// First moments of a unit: first worker to server before the first step, server to worker for a checkpoint.
    First = 5,
    /// Second moments of a unit, as for [`First`](Self::First).
    Second = 6,
    /// First worker to server: begin, with the number of updates before and of steps in all.
    Begin = 7,
    /// Worker to server: send all numbers, for a checkpoint. Server to worker, after them: the number of updates.
    Save = 8,
    /// Worker to server: this worker does no further step; 1 if the others shall end, too.
    Leave = 9,
    /// Server to worker: the sum of squares of the mean gradients, and the first worker whose gradients are not finite.
    Squares = 10,
    /// First server to worker: updates so far, and 1 if the worker shall end.
    Progress = 11,
    /// Server to worker: why it does not apply what was pushed.
    Refused = 12,
    /// Worker to server, after another worker has died: send all parameters, and forget what this one has pushed.
    Pull = 13,
    /// Server to worker: the worker that it waits for.
    Waits = 14,
}

impl Kind {
    const ALL: [Self; 14] = [
        Self::Push,
        Self::Commit,
        Self::Discard,
        Self::Parameters,
        Self::First,
        Self::Second,
        Self::Begin,
        Self::Save,
        Self::Leave,
        Self::Squares,
        Self::Progress,
        Self::Refused,
        Self::Pull,
        Self::Waits,
    ];

    /// The tag of a message about `unit`, or about none in particular: then it is 0.
    pub(crate) fn tag(self, unit: usize) -> u32 {
        (self as u32) << UNIT_BITS | unit as u32
    }

    /// What a tag says; none if it is not one.
    pub(crate) fn of(tag: u32) -> Option<(Self, usize)> {
        let kind = Self::ALL.into_iter().find(|kind| *kind as u32 == tag >> UNIT_BITS)?;
        Some((kind, (tag & ((1 << UNIT_BITS) - 1)) as usize))
    }
}

/// Bits of a tag that say which unit.
const UNIT_BITS: u32 = 24;

/// How a server applies gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Commit {
    /// The learning rate.
    pub lr: f64,
    /// The factor on gradients, for clipping.
    pub scale: f64,
}

impl Commit {
    pub(crate) fn to_numbers(self) -> [f64; 2] {
        [self.lr, self.scale]
    }

    pub(crate) fn of(numbers: &[f64]) -> Option<Self> {
        let &[lr, scale] = numbers else { return None };
        Some(Self { lr, scale })
    }
}

#[cfg(test)]
mod tests {
    use super::Kind;

    #[test]
    fn tags_say_what_they_were_made_of() {
        for kind in Kind::ALL {
            for unit in [0, 1, (1 << 24) - 1] {
                assert_eq!(Kind::of(kind.tag(unit)), Some((kind, unit)));
            }
        }
        assert_eq!((Kind::of(5), Kind::of(u32::MAX)), (None, None));
    }
}

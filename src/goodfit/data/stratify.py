"""How samples are spread over splits so that each gets its share of every class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from goodfit.core.random import hash64

_Ints = npt.NDArray[np.int64]
_TRAIN = 0
_MOVES = 1000  # of units, to polish a split
_TRIES = 50  # at units of a class that a split lacks
_LOOKS = 20_000_000  # at entries of units, to polish a split


@dataclass(frozen=True, slots=True)
class Units:
    """What moves as one: groups and single rows, numbered in the order of their hashes.

    Attributes:
        of_row: Unit of each row of the pool, int64, shape (rows,).
        num_rows: Rows in each unit, int64, shape (units,).
        starts: The classes of unit u are the entries starts[u] to starts[u + 1], int64, shape (units + 1,).
        classes: Class of each entry; the last class stands for rows without any. int64, shape (entries,).
        counts: Samples or objects of that class in the unit, int64, shape (entries,).
        num_classes: Classes with the last one.
    """

    of_row: _Ints
    num_rows: _Ints
    starts: _Ints
    classes: _Ints
    counts: _Ints
    num_classes: int

    def __len__(self) -> int:
        return len(self.num_rows)

    def of_entry(self) -> _Ints:
        """The unit of each entry, int64, shape (entries,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def class_order(self) -> npt.NDArray[np.uint64]:
        """A number for each class, from its units: ties between classes are settled by it, not by their names."""
        order = np.zeros(self.num_classes, np.uint64)
        np.add.at(order, self.classes, hash64(self.of_entry(), self.counts))
        return order


def rooms_of(counts: _Ints, share: float, lowest: _Ints, ties: npt.NDArray[np.uint64]) -> _Ints:
    """Places for each class in a split: at least the lowest, and together the share of all (largest remainders)."""
    exact = counts * share
    rooms = np.maximum(lowest, np.floor(exact).astype(np.int64))
    left = max(0, round(float(counts.sum()) * share) - int(rooms.sum()))
    rooms[np.lexsort((ties, rooms - exact))[:left]] += 1
    return rooms


def fill(sizes: _Ints, room: int, most: int) -> npt.NDArray[np.bool_]:
    """Which units fill a room best: in their order those that still fit, then one more if it brings the sum nearer.

    Takes at least one unit, and `most` at most. Shape: (units,).
    """
    taken = np.zeros(len(sizes), bool)
    if room <= 0 or most <= 0:
        return taken
    waiting = np.arange(len(sizes))
    while most > 0:
        waiting = waiting[sizes[waiting] <= room]
        if not len(waiting):
            break
        ends = np.cumsum(sizes[waiting])
        num = min(int(np.searchsorted(ends, room, side="right")), most)
        taken[waiting[:num]] = True
        room -= int(ends[num - 1])
        most -= num
        waiting = waiting[num:]
    rest = np.flatnonzero(~taken)
    if most > 0 and len(rest):
        smallest = rest[np.argmin(sizes[rest])]
        if not taken.any() or sizes[smallest] < 2 * room:
            taken[smallest] = True
    return taken


class Stratifier:
    """Iterative stratification of units with several classes (Sechidis, Tsoumakas, Vlahavas, 2011).

    The class with the fewest units left goes first. Each of its units, in the order of hashes, goes to the split that
    still wants most of this class; among equal ones to the split that wants most rows.
    """

    def __init__(self, units: Units, made: tuple[int, ...], shares: npt.NDArray[np.float64]) -> None:
        self.units = units
        self.splits = (_TRAIN, *made)  # also the order in which rare classes are handed out
        self.places = np.full(len(units), -1, np.int8)
        self._unit = units.of_entry()
        self._ties = units.class_order()
        self._num_units = np.bincount(units.classes, minlength=units.num_classes)
        counts = np.bincount(units.classes, weights=units.counts, minlength=units.num_classes).astype(np.int64)
        lowest = (self._num_units > len(made)).astype(np.int64)
        lowest[-1] = 0
        wanted = np.zeros((3, units.num_classes), np.int64)
        rows = np.zeros(3)
        for split in made:
            wanted[split] = rooms_of(counts, float(shares[split]), lowest, self._ties)
            rows[split] = units.num_rows.sum() * shares[split]
        wanted[_TRAIN] = counts - wanted.sum(0)
        rows[_TRAIN] = units.num_rows.sum() - rows.sum()
        self._scale = np.maximum(wanted, 1).tolist()
        self._wanted = wanted.tolist()
        self._row_scale = np.maximum(rows, 1).tolist()
        self._rows = rows.tolist()
        self._present = np.zeros((3, units.num_classes), np.int64).tolist()  # units of a class in a split
        self._sizes = [0, 0, 0]  # units in a split
        self._starts, self._classes = units.starts.tolist(), units.classes.tolist()
        self._counts = units.counts.tolist()

    def run(self) -> None:
        """Place every unit."""
        unit = self._unit
        order = np.argsort(self.units.classes, kind="stable")
        bounds = np.searchsorted(self.units.classes[order], np.arange(self.units.num_classes + 1))
        left = self._num_units.copy()
        while left.any():
            fewest = np.flatnonzero(left == left[left > 0].min())
            rarest = int(fewest[np.argmin(self._ties[fewest])])
            chosen = unit[order[bounds[rarest] : bounds[rarest + 1]]]
            chosen = chosen[self.places[chosen] < 0]
            self.places[chosen] = self._hand_out(rarest, chosen.tolist())
            done = self._entries_of(chosen)
            left -= np.bincount(self.units.classes[done], minlength=self.units.num_classes)

    def _entries_of(self, chosen: _Ints) -> _Ints:
        sizes = np.diff(self.units.starts)[chosen]
        return np.repeat(self.units.starts[chosen] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())

    def _hand_out(self, target: int, chosen: list[int]) -> list[int]:
        found = []
        for unit in chosen:
            found.append(max(self.splits, key=lambda s: (self._wanted[s][target], self._rows[s])))
            self._put(unit, found[-1], 1)
        return found

    def _needed(self, target: int) -> tuple[int, ...]:
        """The splits that must have a class: all, or only train where its units do not go round."""
        num = int(self._num_units[target])
        if num == 0 or target == self.units.num_classes - 1:
            return ()
        return self.splits if num >= len(self.splits) else self.splits[:1]

    def _put(self, unit: int, split: int, sign: int) -> None:
        """Add a unit to a split (sign 1) or take it out (sign -1)."""
        wanted, present = self._wanted[split], self._present[split]
        for entry in range(self._starts[unit], self._starts[unit + 1]):
            wanted[self._classes[entry]] -= sign * self._counts[entry]
            present[self._classes[entry]] += sign
        self._rows[split] -= sign * int(self.units.num_rows[unit])
        self._sizes[split] += sign

    def mend(self) -> list[int]:
        """Move units into splits that lack a class they need, train first: what it lacks, it takes; or that are empty.

        Returns the classes that still lack a split.
        """
        classes = np.lexsort((self._ties, self._num_units)).tolist()
        lacking = [(c, s) for s in self.splits for c in classes if s in self._needed(c)]
        missing = [c for c, s in lacking if not self._present[s][c] and not self._fetch(c, s)]
        for split in self.splits:
            spare = [] if self._sizes[split] else [u for u in range(len(self.units)) if self._can_leave(u)]
            if spare:
                self._move(min(spare, key=lambda u: int(self.units.num_rows[u])), split)
        return missing

    def _fetch(self, target: int, split: int) -> bool:
        """Move a unit that its split can spare, or one that others can stand in for; to train, if need be, any."""
        units = self._units_of(target)
        spare = [u for u in units if self._can_leave(u)]
        if spare:
            self._move(spare[0], split)
        elif not any(self._replace(u, split) for u in units[:_TRIES]) and split == _TRAIN:
            self._move(units[0], split)
        return bool(self._present[split][target])

    def _replace(self, unit: int, split: int) -> bool:
        """Move a unit, and others to where it was for the classes that are lacking there now; or leave all as it is."""
        home = int(self.places[unit])
        self._move(unit, split)
        moved = [(unit, home)]
        for target in self._classes[self._starts[unit] : self._starts[unit + 1]]:
            if home not in self._needed(target) or self._present[home][target]:
                continue
            spare = [u for u in self._units_of(target) if u != unit and self._can_leave(u)]
            if not spare:
                for other, place in reversed(moved):
                    self._move(other, place)
                return False
            moved.append((spare[0], int(self.places[spare[0]])))
            self._move(spare[0], home)
        return True

    def _units_of(self, target: int) -> list[int]:
        """The units with a class, the smallest first."""
        units = self._unit[self.units.classes == target]
        return units[np.argsort(self.units.num_rows[units], kind="stable")].tolist()

    def _move(self, unit: int, split: int) -> None:
        self._put(unit, int(self.places[unit]), -1)
        self._put(unit, split, 1)
        self.places[unit] = split

    def polish(self) -> None:
        """Move single units, the best first, for as long as that brings the shares of rows and classes nearer.

        Measured by chi-square: squared deviations over what is wanted, summed over rows and classes. This takes up
        what iterative stratification does not look at, the number of images (of 677 it gave 18 % to val and 10 % to
        test in place of 15 %). The number of moves is limited, so that it takes about a second; 100,000 images are
        near their shares without it.
        """
        units, unit, classes = self.units, self._unit, self.units.classes
        if not len(units):
            return
        needed = np.zeros((3, units.num_classes), bool)
        for target in range(units.num_classes):
            needed[list(self._needed(target)), target] = True
        counts, rows = units.counts.astype(float), units.num_rows.astype(float)
        scale, row_scale = np.array(self._scale, float), np.array(self._row_scale)
        for _ in range(min(_MOVES, _LOOKS // max(1, len(unit)))):
            here = self.places.astype(np.int64)
            at = here[unit]
            wanted, wanted_rows = np.array(self._wanted, float), np.array(self._rows)
            stuck = needed[at, classes] & (np.array(self._present)[at, classes] <= 1)
            gain = counts * (counts + 2 * wanted[at, classes]) / scale[at, classes]
            leave = np.bincount(unit, gain, len(units)) + rows * (rows + 2 * wanted_rows[here]) / row_scale[here]
            leave[unit[stuck]] = np.inf
            leave[np.array(self._sizes)[here] == 1] = np.inf
            change = np.full((3, len(units)), np.inf)
            for split in self.splits:
                gain = counts * (counts - 2 * wanted[split, classes]) / scale[split, classes]
                join = np.bincount(unit, gain, len(units)) + rows * (rows - 2 * wanted_rows[split]) / row_scale[split]
                change[split] = np.where(here == split, np.inf, leave + join)
            split, best = (int(i) for i in np.unravel_index(np.argmin(change.round(9)), change.shape))
            if not change[split, best] < -1e-9:
                break
            self._move(best, split)

    def _can_leave(self, unit: int) -> bool:
        """Whether the unit's split keeps every class that it needs, and some unit, without it."""
        split = int(self.places[unit])
        classes = self._classes[self._starts[unit] : self._starts[unit + 1]]
        spare = (self._present[split][c] > 1 or split not in self._needed(c) for c in classes)
        return self._sizes[split] > 1 and all(spare)

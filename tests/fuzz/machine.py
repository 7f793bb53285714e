"""The state machine of a sequence: its steps, and the invariants after each."""

from __future__ import annotations

import contextvars
import copy
import faulthandler
import gc
import pickle
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, TextIO

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

import graphcache
from graphcache import GraphPool, config, default_pool
from tests.fuzz import pairs as fp
from tests.fuzz.changes import CHANGES, negated, put_back, shifted
from tests.fuzz.modules import leaves
from tests.fuzz.pairs import (
    HELD,
    TOLERANCE,
    Attempt,
    Held,
    Pair,
    Plan,
    Setup,
    difference,
    is_dense,
    is_ours,
)

CARES = ("clear", "trim", "collect", "warm up", "drop")
STALE = "a stale output"  # an error of ours
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}
TOO_LONG = 120  # seconds for one sequence: what hangs is ended, and tells where


class Mismatch(AssertionError):
    """A graphed module did something else than its twin, and graphcache said nothing."""

    count: ClassVar[int] = 0  # hypothesis may raise an error of its own instead

    def __init__(self, what: str) -> None:
        super().__init__(what)
        Mismatch.count += 1


@dataclass
class Stats:
    """Counts of one process, to be added up."""

    sequences: int = 0
    steps: int = 0
    calls: int = 0
    replays: int = 0
    stale: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    our_errors: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Stats:
        return cls(**{k: Counter(v) if isinstance(v, dict) else v for k, v in record.items()})

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


class Fuzz(RuleBasedStateMachine):
    """One sequence: what is done to its pairs, and what must be true after each step."""

    device: ClassVar[torch.device] = torch.device("cpu")
    stats: ClassVar[Stats] = Stats()
    trace: ClassVar[TextIO | None] = None  # where the steps of the sequence are written as they happen
    kind: ClassVar[str | None] = None  # of the first pair; None leaves it to chance

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.cycles = (
            False  # past Python's collector: a buffer that was written to under grad holds itself
        )
        self.held: list[Held] = []
        self.exit = ExitStack()
        self.exit.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", graphcache.GraphCacheWarning)
        if self.device.type == "cpu":
            self.exit.enter_context(graphcache.emulate())
        self.exit.enter_context(torch.no_grad())
        self.lanes = len(default_pool(self.device).lanes)  # of a sequence that failed, and is kept
        gc.freeze()  # what was there before is none of our garbage: collections take no time then
        faulthandler.dump_traceback_later(TOO_LONG, exit=True)
        if self.trace is not None:
            self.trace.seek(0)
            self.trace.truncate()

    def teardown(self) -> None:
        self.stats.replays += sum(pair.replays() for pair in self.pairs)
        self.stats.sequences += 1
        self.pairs, self.held = [], []
        put_back()
        failed = sys.exc_info()[2]
        traceback.clear_frames(failed)  # hypothesis keeps the error, and it would keep the modules
        gc.collect()
        self.exit.close()
        default_pool(self.device).trim()
        faulthandler.cancel_dump_traceback_later()
        lanes = len(default_pool(self.device).lanes) - self.lanes
        if lanes > 0 and failed is None and not self.cycles:
            raise Mismatch(f"{lanes} lanes of the pool outlive their modules")

    def step(self, *what: Any) -> None:
        self.stats.steps += 1
        if self.trace is not None:
            print(*what, file=self.trace, flush=True)

    # Steps

    @initialize(
        setups=st.lists(fp.SETUPS, min_size=1, max_size=2),
        seed=fp.SEEDS,
        own_pool=st.booleans(),
        portable=fp.sampled(False, False, False, True),
        plan=fp.PLANS,
    )
    def build(self, setups: list[Setup], seed: int, own_pool: bool, portable: bool, plan: Plan) -> None:
        """Builds one or two pairs, and calls each twice: the second call may be a replay already."""
        if self.kind is not None:
            setups = [replace(setups[0], kind=self.kind), *setups[1:]]
        self.step("build", setups, seed, own_pool, portable)
        self.exit.enter_context(config.switched(config.portable_var, portable))
        pool = GraphPool(self.device) if own_pool else None
        for number, setup in enumerate(setups):
            self.stats.kinds[setup.kind] += 1
            self.pairs.append(Pair(setup, self.device, pool, seed + number))
            for _ in range(2):
                self._call(self.pairs[-1], plan)

    @rule(which=st.integers(0, 2), plan=fp.PLANS)
    def call(self, which: int, plan: Plan) -> None:
        """Any call."""
        self._call(self._pair(which), plan)

    @rule(which=st.integers(0, 2), changes=st.lists(fp.AGAIN, min_size=2, max_size=4))
    def call_again(self, which: int, changes: list[dict[str, Any]]) -> None:
        """Calls like the last one, with other values and sizes."""
        for change in changes:
            pair = self._pair(which)
            assert pair.last is not None
            self._call(pair, replace(pair.last, **change))

    @rule(which=st.integers(0, 2), change=fp.sampled(*CHANGES), number=st.integers(0, 7), again=fp.AGAIN)
    def change(self, which: int, change: str, number: int, again: dict[str, Any]) -> None:
        """Changes a module and its twin, and calls them as they were called before."""
        self.step("change", which, change, number)
        pair = self._pair(which)
        self._same_fate(lambda twin: CHANGES[change](pair.twin if twin else pair.subject, number))
        assert pair.last is not None
        self._call(pair, replace(pair.last, **again))

    @rule(which=st.integers(0, 2), number=st.integers(0, 7), before=st.booleans(), again=fp.AGAIN)
    def hook(self, which: int, number: int, before: bool, again: dict[str, Any]) -> None:
        """Adds a hook to the module or to one inside it; removes it after a call, or leaves it."""
        self.step("hook", which, number, before)
        pair = self._pair(which)
        handles = []
        for module in (pair.twin, pair.subject):
            modules = list(module.modules())
            target = modules[number % len(modules)]
            handles.append(
                target.register_forward_pre_hook(shifted)
                if before
                else target.register_forward_hook(negated)
            )
        assert pair.last is not None
        self._call(pair, replace(pair.last, **again))
        if number % 2 == 0:
            for handle in handles:
                handle.remove()
            self._call(pair, replace(pair.last, **again))

    @rule(which=st.integers(0, 2), how=fp.sampled(*COPIES), keep=st.booleans(), again=fp.AGAIN)
    def copy(self, which: int, how: str, keep: bool, again: dict[str, Any]) -> None:
        """Copies a module, in place of the first or beside it."""
        self.step("copy", which, how, keep)
        pair = self._pair(which)
        copied = COPIES["deepcopy" if how == "pickle" and pair.style == "class" else how]
        try:
            twin = copied(pair.twin)
            kept = copy.deepcopy((pair.kept, pair.twin_kept))
        except (RuntimeError, AttributeError, pickle.PicklingError):
            return  # a tensor with a history, or functions of its own
        new = copy.copy(pair)
        new.twin = twin
        new.adopt(copied(pair.subject))
        new.kept, new.twin_kept = kept
        if keep and len(self.pairs) < 3:
            self.pairs.append(new)
        else:
            self.stats.replays += pair.replays()
            self.pairs[self.pairs.index(pair)] = new
        assert new.last is not None
        self._call(new, replace(new.last, **again))

    @rule(
        which=st.integers(0, 2),
        what=fp.sampled("clear", "trim", "collect", "warm up", "drop"),
        plan=fp.PLANS,
    )
    def care(self, which: int, what: str, plan: Plan) -> None:
        """Clears, trims, collects or warms up, none of which may change a result."""
        self.step(what, which, plan if what == "warm up" else "")
        pair = self._pair(which)
        if what == "clear":
            self.stats.replays += pair.replays()
            for forward in pair.forwards():
                forward.cache_clear()
        elif what == "trim":
            (pair.options["pool"] or default_pool(self.device)).trim()
        elif what == "collect":
            gc.collect()
        elif what == "drop":
            self.held.clear()
        elif pair.kind.warms and plan.batch > 0:
            self._warm_up(pair, plan)
        self._check()

    @rule(number=st.integers(0, HELD - 1))
    def write_to_output(self, number: int) -> None:
        """A result belongs to its caller, who may write to it."""
        self.step("write to output", number)
        if number < len(self.held) and not self.held[number].shared:
            held = self.held[number]
            self._same_fate(lambda twin: (held.expected if twin else held.actual)[0].zero_())
            self._check()

    @rule(which=st.integers(0, 2), plan=fp.PLANS, other=fp.AGAIN)
    def call_at_once(self, which: int, plan: Plan, other: dict[str, Any]) -> None:
        """Calls from two threads at the same time; of the results, the first may be stale at once."""
        pair = self._pair(which)
        assume(pair.kind.pure and plan.mode != "disabled")
        plans = [replace(plan, feed=-1), replace(plan, **{**other, "feed": -1})]
        self.step("call at once", which, *plans)
        if plans[0].default != "float32":
            return  # which is a switch of the process
        expected = [self._attempt(pair, each, None, twin=True) for each in plans]
        barrier = threading.Barrier(2)
        actual: list[Any] = [None, None]

        def run(number: int) -> None:
            barrier.wait()
            actual[number] = self._attempt(pair, plans[number], None, twin=False)

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(run, number))
            for number in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for mine, theirs in zip(expected, actual, strict=True):
            if self._judge(pair, mine, theirs, f"{pair.setup.kind} in a thread"):
                self._hold(pair, "all", mine, theirs, shared=False)
        pair.last = plans[0]
        self._check()

    # How it is done

    def _pair(self, which: int) -> Pair:
        return self.pairs[which % len(self.pairs)]

    def _call(self, pair: Pair, plan: Plan) -> None:
        self.step("call", self.pairs.index(pair), plan)
        pair.last = plan
        self.cycles |= plan.mode == "grad" and not pair.kind.pure
        before = {name: _clone(value) for name, value in pair.state(twin=True).items()}
        tensors = pair.state(twin=True)
        fed = self.held[plan.feed] if pair.kind.smooth and 0 <= plan.feed < len(self.held) else None
        if fed is not None:
            fed.shared = True  # with a view of it, in eager
            pair.tolerance = max(pair.tolerance, fed.pair.tolerance)
        expected = self._attempt(pair, plan, fed and fed.expected[0], twin=True)
        call = partial(self._attempt, pair, plan, fed and fed.actual[0], twin=False)
        actual = self._elsewhere(plan, call)
        where = pair.setup.kind
        returned = self._judge(pair, expected, actual, where)
        if is_ours(actual.error):
            _restore(pair.twin, tensors, before, pair.kind.attributes)
            _restore(pair.subject, pair.state(twin=False), before, pair.kind.attributes)
            pair.forget_objects()
            if not pair.kind.pure:
                self.held.clear()  # which the twin may have written to
            return
        if plan.mode == "autocast":
            pair.tolerance = TOLERANCE[torch.bfloat16]
        for mine, theirs in zip(expected.inputs, actual.inputs, strict=True):
            self._require(self._unless_stale(mine, theirs, pair.tolerance, f"an argument of {where}"))
        if returned:
            # One that holds what was fed to it may be stale at once: that was overwritten by the call.
            compare = difference if fed is None else self._unless_stale
            self._require(compare(expected.result, actual.result, pair.tolerance, where))
            if pair.kind.seen and fed is None:
                parts = [pair.kind.seen(side.result) for side in (expected, actual)]
                self._require(difference(parts[0], parts[1], pair.tolerance, f"a part of {where}"))
            self._hold(pair, plan.hold, expected, actual, shared=fed is not None)
        if not torch.equal(expected.random, actual.random):
            raise Mismatch(f"{where}: the random generator is in another state afterwards")
        self._check()

    def _attempt(self, pair: Pair, plan: Plan, fed: Tensor | None, *, twin: bool) -> Attempt:
        """Makes the arguments and calls one side, as the plan says."""
        done = Attempt()
        self._seed(plan.seed)
        with self._surroundings(plan, twin=twin):
            try:
                args, kwargs = pair.inputs(plan, fed, self.device, twin=twin)
                done.inputs = [*leaves((args, kwargs))]
                done.result = (pair.call_twin if twin else pair.call)(*args, **kwargs)
            except Exception as error:
                done.error = error.with_traceback(None)
        done.random = torch.cuda.get_rng_state() if self.device.type == "cuda" else torch.get_rng_state()
        self.stats.calls += not twin
        return done

    def _seed(self, seed: int) -> None:
        """As `torch.manual_seed`, which formats a traceback for each device that is not there."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @contextmanager
    def _surroundings(self, plan: Plan, *, twin: bool) -> Iterator[None]:
        with ExitStack() as modes:
            modes.enter_context(torch.set_grad_enabled(plan.mode == "grad"))
            if plan.mode == "inference":
                modes.enter_context(torch.inference_mode())
            elif plan.mode == "autocast":
                modes.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            elif plan.mode == "device":
                modes.enter_context(self.device)
            elif plan.mode == "disabled" and not twin:
                modes.enter_context(graphcache.disabled())
            torch.set_default_dtype(getattr(torch, plan.default))
            modes.callback(torch.set_default_dtype, torch.float32)
            yield

    def _elsewhere(self, plan: Plan, call: Callable[[], Attempt]) -> Attempt:
        """Calls in another thread or on another stream, if the plan says so, and waits."""
        if plan.where == "thread":
            done: list[Attempt] = []
            run = contextvars.copy_context().run
            thread = threading.Thread(target=lambda: done.append(run(call)))
            thread.start()
            thread.join()
            return done[0]
        if plan.where == "stream" and self.device.type == "cuda":
            side, usual = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(usual)
            with torch.cuda.stream(side):
                result = call()
            usual.wait_stream(side)
            torch.cuda.synchronize()  # its memory may be freed now, whatever the stream
            return result
        return call()

    def _warm_up(self, pair: Pair, plan: Plan) -> None:
        if plan.mode == "grad":  # it captures nothing, and what gradients a twin's state wants stays
            plan = replace(plan, mode="no_grad")
        before = {name: _clone(value) for name, value in pair.state(twin=True).items()}
        tensors = pair.state(twin=True)
        expected = self._attempt(pair, plan, None, twin=True)
        _restore(pair.twin, tensors, before, pair.kind.attributes)
        pair.forget_objects()
        call = pair.call
        pair.call = call.forward.warmup if pair.of_modules() else call.warmup
        try:
            actual = self._attempt(pair, plan, None, twin=False)
        finally:
            pair.call = call
            pair.forget_objects()
        # It may do nothing, with a warning, where eager would refuse.
        refused = actual.error is not None and not is_ours(actual.error)
        refused = refused and not pair.subject._forward_pre_hooks  # with which a warm-up has no business
        if refused and type(actual.error) is not type(expected.error):
            raise Mismatch(f"{pair.setup.kind}: warmup {_told(actual)}, and eager {_told(expected)}")

    def _judge(self, pair: Pair, expected: Attempt, actual: Attempt, where: str) -> bool:
        """Return True if both sides returned something; raise if one did that should not have."""
        if is_ours(actual.error):
            short = _short(actual.error)
            if short == STALE and not self._may_be_stale():
                raise Mismatch(f"{where}: an output is stale, and all are to be copied")
            self.stats.our_errors[short] += 1
            return False
        if type(expected.error) is not type(actual.error):
            raise Mismatch(f"{where}: {_told(actual)}, and eager {_told(expected)}")
        for tensor in leaves((expected.inputs, expected.result, list(pair.state(twin=True).values()))):
            pair.tolerance = max(pair.tolerance, TOLERANCE.get(tensor.dtype, 0.0))
        return actual.error is None

    def _hold(self, pair: Pair, hold: str, expected: Attempt, actual: Attempt, *, shared: bool) -> None:
        """Keeps a result, or views of it alone."""
        mine, theirs = list(leaves(expected.result)), list(leaves(actual.result))
        if hold == "no" or not mine:
            return
        kept = {tensor.untyped_storage().data_ptr() for tensor in pair.twin_kept.values()}
        given = {tensor.untyped_storage().data_ptr() for tensor in expected.inputs} - kept
        shared = (
            shared
            or pair.kind.views
            or any(tensor.untyped_storage().data_ptr() in given for tensor in mine)
        )
        if hold == "view" and all(map(is_dense, mine)):  # of others, a view alone may be dense
            mine, theirs = (
                [t[..., :1] if t.dim() else t.view(1) for t in side] for side in (mine, theirs)
            )
        self.held = [*self.held[-HELD + 1 :], Held(mine, theirs, pair, pair.setup.kind, shared)]

    def _same_fate(self, change: Callable[[bool], Any]) -> None:
        """Makes a change to both sides; both must refuse it, or none, but for stale results."""
        errors: list[Exception | None] = []
        for twin in (True, False):
            try:
                change(twin)
                errors.append(None)
            except Exception as error:
                errors.append(error.with_traceback(None))
        if type(errors[0]) is not type(errors[1]) and not is_ours(errors[1]):
            raise Mismatch(f"a change: {errors[1]!r}, and eager {errors[0]!r}")

    def _check(self) -> None:
        """Compares the state of all pairs, and every result that is still held."""
        for pair in self.pairs:
            state = (pair.compared(twin=True), pair.compared(twin=False))
            self._require(difference(*state, pair.tolerance, f"the state of {pair.setup.kind}"))
        for held in self.held:
            for mine, theirs in zip(held.expected, held.actual, strict=True):
                self._require(
                    self._unless_stale(mine, theirs, held.pair.tolerance, f"held from {held.origin}")
                )

    def _unless_stale(self, mine: Any, theirs: Any, tolerance: float, where: str) -> str | None:
        try:
            return difference(mine, theirs, tolerance, where)
        except RuntimeError as error:
            self.stats.stale += 1
            return None if is_ours(error) and self._may_be_stale() else f"{where}: {error!r}"

    def _may_be_stale(self) -> bool:
        """Return True if outputs of a pair expire; those of all others are copied."""
        pairs = [*self.pairs, *(held.pair for held in self.held)]
        return any(pair.setup.stale == "error" for pair in pairs)

    def _require(self, wrong: str | None) -> None:
        if wrong:
            raise Mismatch(wrong)


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        with torch.inference_mode(value.is_inference()):
            return value.detach().clone()
    if isinstance(value, dict):
        return {key: _clone(each) for key, each in value.items()}
    return copy.deepcopy(value)


def _restore(
    module: nn.Module, state: dict[str, Any], before: dict[str, Any], attributes: Sequence[str]
) -> None:
    """Puts back what a call changed: on the side that ran it, where the other refused."""
    for name in [name for name in module._buffers if name not in before]:
        del module._buffers[name]  # which the call registered
    for name in attributes:
        setattr(module, name, _clone(before[name]))
    with torch.inference_mode():  # any tensor may be written to there
        for name, value in before.items():
            if name not in attributes:
                state[name].copy_(value)


def _short(error: BaseException | None) -> str:
    stale = "its memory was overwritten" in str(error)
    return STALE if stale else f"{type(error).__name__}: {str(error)[:90]}"


def _told(done: Attempt) -> str:
    return "returned" if done.error is None else f"raised {done.error!r}"

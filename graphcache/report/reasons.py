"""The reasons for which a call runs eagerly: what each means, and what a user can do about it."""

from enum import Enum


class Reason(Enum):
    """The kind of a reason; each has a row in docs/troubleshooting.md.

    Attributes:
        meaning: the text that messages and `cache_info().eager` give.
        advice: the first step that a user can take.
    """

    # Eager by design.
    FIRST_CALL = "the first call of a signature", "Nothing; the capture follows it."
    SEEN_ONCE = (
        "the first call of another signature",
        "Nothing, or warmup(*example_args); one that never comes again is not worth a capture.",
    )
    COMPARED = "compared with a padded replay", "Nothing; every so often a padded replay is checked."
    TIMED = "timed beside its graph", "Nothing; each size is timed once."

    # The surroundings of the call.
    DISABLED = "disabled", "Leave graphcache.disabled(), or unset GRAPHCACHE_DISABLE."
    INSIDE_CAPTURE = "inside another capture or first call", "Nothing; it is part of the outer graph."
    TRACING = "torch.jit tracing", "Trace a module that is not decorated."
    DISPATCH_MODE = "a TorchDispatchMode is active", "Call the module outside the mode."
    FUNCTION_MODE = "a TorchFunctionMode is active", "Call the module outside the mode."
    FUNC_TRANSFORM = "a torch.func transform", "Call the module outside vmap and grad."
    FORWARD_AD = "forward-mode differentiation", "Call the module outside the dual level."
    NEEDS_GRAD = (
        "gradients are needed (torch.no_grad() or inference_mode() is not on)",
        "Call the module under torch.inference_mode() or torch.no_grad().",
    )
    PROFILED = (
        "a profiler of Python code is on (cProfile, with_stack=True); captured later",
        "Call the module once before the profiler starts.",
    )
    REPLICA = "a DataParallel replica", "Give each device a graphed module of its own."
    HOOKS = "hooks inside the forward", "Remove the hooks, or decorate the part below them."

    # The arguments of the call.
    WRONG_ARGUMENTS = "arguments that the forward does not take", "Mend the call; eager raises."
    NO_TENSOR = "no tensor among the arguments", "Pass at least one tensor."
    NO_BATCH_DIM = "no argument has the batch dimension", "Set batch_dim, by argument name if needed."
    EMPTY_BATCH = "an empty batch", "Skip such calls."
    ABOVE_LARGEST_SIZE = "a batch above the largest size", "Add a larger size to sizes=."
    CPU_TENSORS = (
        "CPU tensors (graphcache.emulate() emulates graphs there)",
        "Move module and arguments to a GPU; in tests, use graphcache.emulate().",
    )
    OTHER_DEVICE = "tensors on a device without graphs", "Use a CUDA device."
    SEVERAL_DEVICES = "tensors on several devices", "Decorate the parts that lie on one device."
    ARGUMENT_TYPE = (
        "an argument that no graph takes",
        "Pass tensors, constants, and containers of these.",
    )
    ARGUMENT_TENSOR = "a tensor argument that no graph takes", "Pass it as a plain, dense tensor."
    BOUND_OUTPUT = "a bound argument is the output of a graph", "Pass a .clone() of it."
    OVERLAPS_MUTATED = (
        "an argument lies in memory that the forward writes",
        "Pass a .clone() of the argument.",
    )
    SHARES_WITH_OBJECT = (
        "an argument lies in memory of an object that is passed, too",
        "Pass a .clone() of the argument.",
    )
    HELD_BY_ANOTHER_THREAD = (
        "another thread holds an output of its lane",
        "Nothing; a few calls later it is captured elsewhere. Or give each thread a pool of its own.",
    )
    CAPTURED_ELSEWHERE = (
        "another thread captures into the same pool",
        "Nothing; later calls replay. Or give each thread a pool of its own.",
    )
    OBJECT_FILLED = "the forward changes an object", "Nothing; later calls replay."
    OBJECT_CHANGES = (
        "the forward changes an object at every call",
        "Change tensors of the object in place, and nothing else.",
    )
    OBJECT_EACH_CALL = (
        "another object at each call",
        "Keep one object, or pass its tensors as arguments of their own.",
    )
    OBJECT_HOLDS_OUTPUT = "an object holds an output of a graph", "Put a .clone() into the object."
    OBJECT_UNGUARDED = (
        "an object holds tensors that no guard can follow",
        "Hold tensors in plain attributes, lists and dicts.",
    )

    # The history of the forward.
    UNSETTLED = "it changed attributes", "Nothing; later calls are captured."
    RECAPTURED_TOO_OFTEN = (
        "what it captured is replaced again and again",
        "Pass what changes as an argument, and change tensors in place (copy_).",
    )
    TOO_MANY_SIGNATURES = (
        "too many signatures",
        "Pad the other dimensions, pass numbers as tensors, and keep large arguments at one address.",
    )
    TOO_SLOW = "its graph saves less than min_gain", "Nothing, or lower min_gain."
    WARMUP_CHANGES_OBJECT = "warmup() may not change an object", "Call the forward itself instead."

    # The forward can't be captured.
    READS_VALUE = (
        "it reads a value on the host",
        "Keep the value on the device: torch.where, masked_fill, the *_ex variants.",
    )
    VALUE_DEPENDENT_SHAPE = (
        "a shape depends on values",
        "Use torch.where or masked_fill in place of masks and nonzero.",
    )
    HOST_COPY = (
        "it copies between the host and the device",
        "Make the tensor once, on the device, and keep it as a buffer.",
    )
    TWO_DEVICES = "it works on several devices", "Decorate the parts that lie on one device."
    FFT_PLAN = "a Fourier transform", "Decorate the parts before and after the transform."
    COLLECTIVE = "it waits for other processes", "Decorate the parts between the collectives."
    CALLERS_GENERATOR = (
        "it draws from a torch.Generator of the caller's",
        "Draw from the default generator.",
    )
    SEEDS_GENERATOR = "it sets the state of a random generator", "Seed outside the forward."
    HOST_RANDOM = (
        "it draws random numbers on the host",
        "Draw on the device, or outside the forward.",
    )
    READS_CLOCK = "it reads the clock", "Pass the time as a tensor, or read it outside the forward."
    TENSOR_SUBCLASS = "it uses a tensor subclass", "Use plain tensors inside the forward."
    UNSUPPORTED_TENSOR = (
        "it uses a nested, sparse or quantised tensor",
        "Use dense tensors inside the forward.",
    )
    FOREIGN_KERNELS = (
        "another library launches kernels",
        "Decorate the parts before and after these kernels.",
    )
    COMPILED_WITH_GRAPHS = (
        "torch.compile makes CUDA graphs of it",
        "Compile with mode='default' or 'max-autotune-no-cudagraphs'.",
    )
    SCRIPTED = "a part is scripted by torch.jit", "Use the module as it was before torch.jit."
    NOT_EMULATED = "emulation can't record it", "Test it on a GPU."
    DIFFERS_IN_CAPTURE = (
        "it returns something else while a capture is under way",
        "Do not branch on torch.cuda.is_current_stream_capturing().",
    )
    REPLAY_DIFFERS = (
        "its graph returns something else than it does itself",
        "Launch kernels on the current stream only, and return the same for the same input.",
    )
    RESULT_TYPE = (
        "a result that no graph returns",
        "Return tensors, constants, and containers of these.",
    )
    RESULT_TENSOR = "it returns a tensor that is more than its data", "Return plain tensors."
    RESULT_VALUE_CHANGES = (
        "its result holds a Python value that changes from call to call",
        "Return that value as a tensor.",
    )
    CHANGES_VALUES = (
        "it changes Python values",
        "Only compare a count with constants and add to it; or keep the value in a tensor.",
    )
    KEEPS_TENSOR = (
        "it keeps a tensor that it made",
        "Copy the tensor into a buffer (copy_), or return it.",
    )
    CHANGES_ARGUMENT = "it changes an argument", "Return the new value instead."
    ITERATOR = "it reads an iterator", "Keep an index in place of the iterator."
    READS_HELD_OUTPUT = "it reads an output of a graph that was kept", "Keep a .clone() of it."
    UNGUARDED_TENSOR = (
        "it reaches a tensor that no guard can follow",
        "Make the tensor an argument, a buffer or an attribute.",
    )
    OUT_OF_MEMORY = "it does not fit into memory", "Use smaller sizes."
    CAPTURE_FAILED = "torch or the driver stopped the capture", "Read the error; see the debug log."

    def __init__(self, meaning: str, advice: str) -> None:
        self.meaning = meaning
        self.advice = advice


# Calls that graphs could serve if the caller or the forward were a little different: each warns once.
# The others warn elsewhere, or are modes of a call that its caller chose.
WARNED = frozenset(
    {
        *(Reason.HOOKS, Reason.NO_TENSOR, Reason.NO_BATCH_DIM, Reason.SEVERAL_DEVICES),
        *(Reason.ARGUMENT_TYPE, Reason.ARGUMENT_TENSOR, Reason.BOUND_OUTPUT, Reason.OVERLAPS_MUTATED),
        *(Reason.OBJECT_EACH_CALL, Reason.OBJECT_HOLDS_OUTPUT, Reason.OBJECT_UNGUARDED),
    }
)


class EagerReason(str):
    """The text of one reason with its detail, as a key of `cache_info().eager`.

    Attributes:
        reason: the kind of the reason.
    """

    __slots__ = ("reason",)
    reason: Reason

    def __new__(cls, reason: Reason, text: str = "") -> "EagerReason":
        """Makes the text; without one, the meaning of the reason."""
        made = super().__new__(cls, text or reason.meaning)
        made.reason = reason
        return made


def text_of(reason: Reason, detail: str = "") -> str:
    """Returns the meaning of a reason, followed by its detail where there is one."""
    return f"{reason.meaning}: {detail}" if detail else reason.meaning


class Bypass(Exception):
    """Sends one call to the eager forward, for a reason that `cache_info().eager` counts.

    Args:
        reason: the kind of the reason.
        detail: what follows the meaning of the kind, after a colon; or nothing.
        text: what stands in place of the meaning and the detail.

    Attributes:
        why: the text, with the kind of the reason.
        detail: the detail; the whole text where there is none.
    """

    def __init__(self, reason: Reason, detail: str = "", *, text: str = "") -> None:
        self.why = EagerReason(reason, text or text_of(reason, detail))
        self.detail = detail or str(self.why)
        super().__init__(self.why)

"""Rewards that do wrong, by name: each deed gets the number of samples and returns, raises or spoils something.

`act` is the reward; its prompts name the deed. Runs in interpreters without our packages too. CASES says what must
become of each of 4 samples: how many are lost, and how the reason begins; `parts` are those that must come through."""

import asyncio
import decimal
import fractions
import os
import random
import signal
import sys
import tempfile
import warnings

GOOD = 0.5
CASES = {}


def act(prompts, images):
    if prompts[0] == "mend":
        raise type("ImageRLError", (Exception,), {})("mend\nme \ud800\x1b[31m" + "x" * 5000)
    return CASES[prompts[0]][0](len(images))


def case(lost, reason="", parts=()):
    def keep(deed):
        CASES[deed.__name__] = deed, lost, reason, parts
        return deed

    return keep


def returns(name, value, reason, lost=4):
    CASES[name] = (lambda size: value), lost, reason, ()


def ends_in(name, entry, reason):
    """All but the last value are good."""
    CASES[name] = (lambda size: [GOOD] * (size - 1) + [entry]), 1, reason, ()


def with_breakdown(name, breakdown, reason="", lost=0, parts=()):
    def deed(size):
        return {"rewards": [GOOD] * size, "breakdown": breakdown(size)}

    CASES[name] = deed, lost, reason, parts


def with_reason(name, why, reason):
    CASES[name] = (lambda size: {"rewards": [float("nan")] * size, "reason": why}), 4, reason, ()


def raises(name, error, reason):
    def deed(size):
        raise error

    CASES[name] = deed, 4, reason, ()


class Odd:
    """An object of which nothing works."""

    def __init__(self, error=None):
        self.error = error or ValueError("asked to")

    def fail(self, *_):
        raise self.error

    __float__ = __repr__ = __str__ = __len__ = __iter__ = __bool__ = __eq__ = __getitem__ = fail
    __hash__ = object.__hash__


class Endless(list):
    def __iter__(self):
        while True:
            yield GOOD


class Liar(list):
    def __len__(self):
        return 4


class OddFloat(float):
    def __float__(self):
        raise ArithmeticError("no")


class OddText(str):
    def split(self, *_):
        raise ValueError("no")

    def __str__(self):
        raise ValueError("no")


class OddError(Exception):
    def __str__(self):
        raise ValueError("no words")


class Cold(BaseException):
    pass


async def later(size):
    return [GOOD] * size


# What is no list of numbers.
returns("nothing", None, "returned NoneType; return a list")
returns("a number", 0.5, "returned float; return a list")
returns("a text", "0.5", "returned str; return a list")
returns("bytes", b"0123", "returned bytes; return a list")
returns("an empty dict", {}, "returned a dict; it must have the keys rewards")
returns(
    "a dict of other keys", {"rewards": [GOOD] * 4, "scores": []}, "returned a dict; it must have the keys"
)
for what, wrong in (
    ("regions of fewer samples", [[]] * 3),
    ("regions without a box", [[(1.0,)]] * 4),
    ("regions of texts", [["abcde"]] * 4),
    ("regions that are infinite", [[(1.0, 0, 0, 1, float("inf"))]] * 4),
    ("a number for regions", 7),
    ("too many regions", [[(1.0, 0, 0, 1, 1)] * 257] * 4),
):
    returns(what, {"rewards": [GOOD] * 4, "regions": wrong}, "returned regions that are not ")
returns("a set", {0.1, 0.2, 0.3, 0.4}, "returned set; return a list")
returns("an iterator", iter([GOOD] * 4), "returned list_iterator; return a list")
returns("a class", list, "TypeError: ")
returns("an error", ValueError("here"), "returned ValueError; return a list")
returns("a function", len, "returned builtin_function_or_method; return a list")
returns("an odd object", Odd(), "ValueError: asked to")
returns("no end", Endless([1]), "returned more than ")
returns("a list that lies", Liar([GOOD]), "returned 1 values for ")
returns("an empty list", [], "returned 0 values for 4 samples")
returns("too few", [GOOD] * 3, "returned 3 values for 4 samples")
returns("too many", [GOOD] * 5, "returned more than 4 values for 4 samples")
returns("ellipsis", ..., "returned ellipsis; return a list")


@case(4, "returned generator; return a list")
def generates(size):
    return (GOOD for _ in range(size))


@case(4, "returned coroutine; return a list")
def awaits(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        waiting = later(size)
    waiting.close()
    return waiting


@case(4, "TypeError: len() of unsized object")
def array_without_shape(size):
    import numpy

    class Scalar:
        def __len__(self):
            return len(numpy.array(GOOD))

        def __iter__(self):
            return iter(numpy.array(GOOD)) if len(self) else iter(())

    return Scalar()


# Numbers that are none.
ends_in("too large an integer", 10**400, "returned 1000")
ends_in("too small an integer", -(10**400), "returned -1000")
ends_in("an integer that cannot be printed", 10**5000, "returned <int without a text>, which is not a number")
ends_in("not a number", float("nan"), "returned nan")
ends_in("infinity", float("inf"), "returned inf")
ends_in("minus infinity", float("-inf"), "returned -inf")
ends_in("one none", None, "returned None")
ends_in("one text", "1.0", "returned '1.0', which is not a number")
ends_in("one odd text", OddText("1.0"), "returned '1.0', which is not a number")
ends_in("complex", 1j, "returned 1j, which is not a number")
ends_in("an object that is no float", Odd(), "returned <Odd without a text>, which is not a number")
ends_in("an odd float", OddFloat(1.0), "returned 1.0, which is not a number")
ends_in("a signalling decimal", decimal.Decimal("sNaN"), "returned Decimal('sNaN'), which is not a number")
ends_in("a large decimal", decimal.Decimal("1e400"), "returned inf")
ends_in("a large fraction", fractions.Fraction(10**400), "returned Fraction(1000")
ends_in("a list", [1.0], "returned [1.0], which is not a number")
ends_in("a dict", {"score": 1.0}, "returned {'score': 1.0}, which is not a number")
ends_in("a function among numbers", len, "returned <built-in function len>, which is not a number")
CASES["a float that exits"] = (
    (lambda size: [Odd(SystemExit(3))] * size),
    4,
    "SystemExit: 3 (bad_rewards.py:",
    (),
)

# Breakdowns and reasons.
with_breakdown("a list as breakdown", lambda size: [GOOD] * size, "returned list as breakdown", 4)
with_breakdown("a number as breakdown", lambda size: 7, "returned int as breakdown", 4)
with_breakdown("an odd breakdown", lambda size: Odd(), "returned Odd as breakdown", 4)
with_breakdown("a short part", lambda size: {"part": [GOOD]}, "returned 1 values for 4 samples", 4)
with_breakdown("a number as part", lambda size: {"part": 0.5}, "returned float; return a list", 4)
with_breakdown("a text as part", lambda size: {"part": "0.5"}, "returned str; return a list", 4)
with_breakdown(
    "the same name twice", lambda size: {1: [0] * size, "1": [0] * size}, "returned two parts called '1'", 4
)
with_breakdown("a lone surrogate", lambda size: {"a\ud800b": [GOOD] * size}, parts=("a�b",))
with_breakdown("a number as name", lambda size: {3: [GOOD] * size}, parts=("3",))
with_breakdown("escapes in a name", lambda size: {"\x1b[31mred\n\tink": [GOOD] * size}, parts=("red ink",))
with_breakdown("a long name", lambda size: {"n" * 10**6: [GOOD] * size}, parts=("n" * 99 + "…",))
with_breakdown("an odd name", lambda size: {Odd(): [GOOD] * size}, parts=("<Odd without a text>",))
with_breakdown("texts in a part", lambda size: {"part": ["x"] * size}, parts=("part",))
with_breakdown("a large number in a part", lambda size: {"part": [10**400] * size}, parts=("part",))
with_reason("a number as reason", 7, "7")
with_reason("a list as reason", ["a", "b"], "['a', 'b']")
with_reason("an odd reason", Odd(), "<Odd without a text>")
with_reason("a reason of an odd text", OddText("too red"), "too red")
with_reason("a reason of many lines", "first\n\nsecond\x1b[31m\ud800", "first second�")
with_reason("a long reason", "why " * 10**6, "why why why")

# What is raised.
raises("an exception", ValueError("too\nred"), "ValueError: too red (bad_rewards.py:")
raises("an error without words", OddError(), "OddError: <OddError without a text> (bad_rewards.py:")
raises("an exit", SystemExit(3), "SystemExit: 3 (bad_rewards.py:")
raises("an interruption", KeyboardInterrupt(), "KeyboardInterrupt (bad_rewards.py:")
raises("a closed generator", GeneratorExit(), "GeneratorExit (bad_rewards.py:")
raises("a base exception", Cold("brr"), "Cold: brr (bad_rewards.py:")
raises("a cancellation", asyncio.CancelledError(), "CancelledError (bad_rewards.py:")
raises("the end of an iterator", StopIteration(4), "StopIteration: 4 (bad_rewards.py:")
raises("no memory", MemoryError(), "MemoryError (bad_rewards.py:")
raises("a long error", ValueError("long " * 10**6), "ValueError: long long long")
raises("an error of a surrogate", ValueError("\ud800"), "ValueError: � (bad_rewards.py:")
raises("a broken pipe", BrokenPipeError("pipe"), "BrokenPipeError: pipe (bad_rewards.py:")
raises("a time-out", TimeoutError("late"), "TimeoutError: late (bad_rewards.py:")


@case(4, "SystemExit: goodbye (bad_rewards.py:")
def exits(size):
    sys.exit("goodbye")


@case(4, "RecursionError: maximum recursion depth exceeded")
def recurses(size):
    return recurses(size)


@case(4, "ZeroDivisionError: division by zero (bad_rewards.py:")
def divides(size):
    return [1 / 0] * size


# What is left changed.
def leaves(deed):
    CASES[deed.__name__] = (lambda size: deed() or [GOOD] * size), 0, "", ()


@leaves
def another_folder():
    os.chdir(tempfile.gettempdir())


@leaves
def a_folder_that_is_gone():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


@leaves
def another_environment():
    os.environ["IMAGERL_OF_A_REWARD"] = "1"


@leaves
def an_empty_environment():
    os.environ.clear()


@leaves
def other_random_numbers():
    random.seed(1)


@leaves
def other_numpy_random_numbers():
    import numpy

    numpy.random.seed(1)
    numpy.seterr(all="raise")


@leaves
def other_torch_random_numbers():
    import torch

    torch.manual_seed(1)


@leaves
def another_default_type():
    import torch

    torch.set_default_dtype(torch.float64)


@leaves
def another_default_device():
    import torch

    torch.set_default_device("meta")


@leaves
def no_gradients():
    import torch

    torch.set_grad_enabled(False)


@leaves
def more_threads():
    import torch

    torch.set_num_threads(torch.get_num_threads() + 1)


@leaves
def warnings_as_errors():
    warnings.simplefilter("error")


@leaves
def no_recursion():
    sys.setrecursionlimit(sys.getrecursionlimit() + 100)


@leaves
def no_output():
    sys.stdout = sys.stderr = None


@leaves
def deaf():
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 5.0)
    except ValueError:  # only where the main thread scores
        pass

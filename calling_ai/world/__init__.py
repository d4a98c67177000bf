"""Real Big Five respondents, a simulated town with known truth, and real decisions about coupons."""


def __getattr__(name: str) -> object:
    """Return the module `coupons`, which can be called like its function, when it is first asked for."""
    if name == "coupons":
        return __import__(f"{__name__}.{name}", fromlist=[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Cache → student: data, losses, step, loop, results. Never loads the teacher."""

if __name__ != "decant.trainer":
    raise ImportError(
        f"{__file__}: imported as {__name__!r}; write `import decant.trainer`. Under two names "
        "every class would exist twice."
    )

"""Corpus → rows → cache, on Beam."""

if __name__ != "decant.pipelines":
    raise ImportError(
        f"{__file__}: imported as {__name__!r}; write `import decant.pipelines`. Under two names "
        "every class would exist twice."
    )

"""`python -m pipelines precompute [CONFIG.toml] [--flag value …]`."""

import logging
import sys

from pipelines.config import Precompute
from schemas.settings import parse

COMMANDS = ("precompute",)


def main(arguments: list[str]) -> int:
    """Run a command; errors of input are printed without a traceback. Returns the exit status."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: python -m pipelines {{{','.join(COMMANDS)}}} …", file=sys.stderr)
        return 2
    # A worker's error is printed once, as it was meant, not also as Beam's own traceback, and
    # nobody needs to hear which of Beam's optional clouds are not installed.
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        config = parse(Precompute, arguments[1:], program="python -m pipelines precompute")
        return _precompute(config)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        if "No space left" in str(error):
            print("Free some space and run again: what is committed stays.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again and it goes on from here", file=sys.stderr)
        return 130


def _precompute(config: Precompute) -> int:
    # Imported here, so that --help and a config typo do not wait for jax and Beam.
    from pipelines.precompute import precompute
    from schemas import open_cache

    precompute(config)
    cache = open_cache(config.output)
    units = [unit for part in cache.manifest.parts for unit in part.units]
    size = sum(entry.bytes for unit in units for entry in unit.files.values())
    scored = sum(unit.scored for unit in units)
    print(
        f"sealed {config.output}: {len(cache):,} rows, {scored:,} positions with targets, "
        f"{size / 1e6:.1f} MB, cache_id {cache.manifest.cache_id}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m pipelines precompute [CONFIG.toml] [--flag value …]`."""

import logging
import sys

from pipelines.beam_runner import WorkerError
from pipelines.config import Precompute
from pipelines.precompute import precompute
from schemas.cache import open_cache
from schemas.settings import parse

COMMANDS = ("precompute",)


def main(arguments: list[str]) -> int:
    """Run a command; errors of input are printed without a traceback. Returns the exit status."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: python -m pipelines {{{','.join(COMMANDS)}}} …", file=sys.stderr)
        return 2
    # A worker's error is printed once, as it was meant, not also as Beam's own traceback.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        config = parse(Precompute, arguments[1:], program="python -m pipelines precompute")
        manifest = precompute(config)
        cache = open_cache(config.output)
        size = sum(entry.bytes for unit in manifest.parts[0].units for entry in unit.files.values())
        print(
            f"sealed {config.output}: {len(cache):,} rows, {size / 1e6:.1f} MB, cache_id "
            f"{cache.manifest.cache_id}"
        )
    except (ValueError, OSError, RuntimeError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        if "No space left" in str(error):
            print("Free some space and run again: what is committed stays.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again and it goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

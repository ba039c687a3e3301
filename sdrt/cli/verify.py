"""`sdrt verify`: a bundle's hashes and its golden image, checked on this machine."""

from sdrt.cli.build import parity_text
from sdrt.cli.options import AsJson, BundleFolder, Threads
from sdrt.cli.terminal import emit, facts, progress_bar, seconds_text, size_text, title


def verify(bundle: BundleFolder, threads: Threads = None, as_json: AsJson = False) -> None:
    """Check every hash of a bundle, and draw its golden image again."""
    import msgspec

    from sdrt.bundle import Bundle
    from sdrt.verify import verify_bundle

    opened = Bundle.open(bundle)
    with progress_bar() as progress:
        found = verify_bundle(opened, threads=threads, progress=progress)
    now, allowed = parity_text(found.parity)
    then, _ = parity_text(found.sealed)
    rows = [
        ("files", f"{found.files} with the sealed sha256, {size_text(found.size_bytes)}"),
        ("golden image", f"{now} from {opened.manifest.golden.reference} (sealed with {then}, allowed {allowed})"),
        ("checked in", seconds_text(found.seconds)),
    ]
    if found.completed:
        rows.append(("device", "drawn on it for the first time: the seal is complete"))
    result = {"bundle": str(bundle), "valid": True, **msgspec.to_builtins(found)}
    emit(result, [title(f"{bundle}: as it was sealed"), *facts(rows)], as_json=as_json)

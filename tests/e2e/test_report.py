"""The report of a run in a browser: a screenshot, its sections, and no network."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import command
from xar_scale.evaluate.digits import cache_digits

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
LIMIT_S = 200
SECTIONS = ("summary", "curves", "precision", "stragglers", "checkpoints", "samples", "evaluations", "config")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium to render the page")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of a real run, made by the commands."""
    folder = tmp_path_factory.mktemp("report")
    cache_digits(folder / "data", 1000)
    small = ["train.engine=single", "train.steps=12", "train.log_every=2", "optim.warmup_steps=2", "train.global_batch=8"]
    small += ["model.width=16", "model.heads=2", "train.checkpoint_every=6", "data.workers=0", f"data.path={folder / 'data'}"]
    trained = command("xar-scale", "train", "--recipe", "digits", "--run-dir", str(folder / "run"), *small)
    assert trained.returncode == 0, trained.stderr
    (folder / "run" / "samples").mkdir()
    for step in (6, 12):
        Image.linear_gradient("L").save(folder / "run" / "samples" / f"step-{step:08d}.png")
    reported = command("xar-scale", "report", str(folder / "run"))
    assert reported.returncode == 0, reported.stderr
    return folder / "run" / "report.html"


def browse(page: Path, folder: Path, *options: str) -> str:
    """Return what the browser prints. It has no network: every request is refused."""
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'browser'}"]
    done = command(BROWSER or "", *fixed, "--proxy-server=127.0.0.1:9", *options, page.as_uri(), limit_s=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(page: Path, folder: Path, width: int, *, dark: bool = False) -> Image.Image:
    path = folder / "picture.png"
    browse(
        page,
        folder,
        f"--screenshot={path}",
        f"--window-size={width},1600",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    )
    with Image.open(path) as opened:
        return opened.convert("RGB")


def test_the_browser_finds_every_section_and_all_pictures_without_a_network(page, tmp_path):
    probe = "<script>onload = () => document.title = [...document.images].map(i => i.naturalWidth).join()</script>"
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text() + probe)
    seen = browse(probed, tmp_path, "--dump-dom")
    assert all(f'id="{name}"' in seen for name in SECTIONS)
    assert seen.count("<figure") == seen.count("</figure>") == 8 and seen.count("<svg") == 6
    assert "<title>256,256</title>" in seen  # both pictures could be decoded
    assert "step-00000012 <b>latest</b>" in seen


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_is_drawn_and_fits_the_window(page, tmp_path, width):
    image = picture(page, tmp_path, width)
    assert image.size == (width, 1600)
    colours = image.getcolors(1 << 24)
    assert len(colours) > 100 and max(colours)[1] == (255, 255, 255)
    assert max(colours)[0] < 0.95 * width * 1600  # and it is not blank
    probed = tmp_path / "probed.html"
    probed.write_text(
        page.read_text() + "<script>onload = () => document.title = document.body.parentNode.scrollWidth</script>"
    )
    assert f"<title>{width}</title>" in browse(probed, tmp_path, "--dump-dom", f"--window-size={width},1600")


def test_the_page_is_dark_in_dark_mode(page, tmp_path):
    light, dark = (picture(page, tmp_path, 1280, dark=dark).convert("L") for dark in (False, True))
    assert light.getpixel((2, 2)) == 255 and dark.getpixel((2, 2)) < 40
    for image, brightest in ((light, True), (dark, False)):
        _, paper = max(image.getcolors())
        assert (paper == 255) is brightest and (paper < 40) is not brightest
        heading = image.crop((0, 50, 130, 100))
        assert abs(heading.getextrema()[0 if brightest else 1] - paper) > 200  # legible

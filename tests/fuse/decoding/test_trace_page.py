"""The page is whole, offline, and safe whatever the tokens are."""

from html.parser import HTMLParser

from mtft.fuse.decoding.trace_page import trace_page


def token(text, alpha, favourite=1, clipped=False):
    top = [{"token": favourite, "text": text, "logprob": -0.5}]
    return {
        "token": 1,
        "text": text,
        "alpha": [alpha],
        "lam": 1.0,
        "g": 0.1,
        "c": [0.2],
        "tv": 0.3,
        "clipped": clipped,
        "top": {"fused": top, "strong": top, "base": top, "experts": [top]},
    }


class Spans(HTMLParser):
    def __init__(self):
        super().__init__()
        self.spans, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "span":
            self.spans.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


def read(page):
    parser = Spans()
    parser.feed(page)
    return parser


def test_colour_grows_with_alpha_and_marks_show():
    page = trace_page([{"id": "a", "trace": [token("x", 0.0), token("y", 1.0, 2), token("z", 2.0, clipped=True)]}])
    tokens = [span for span in read(page).spans if "title" in span]
    shares = [float(span["style"].rsplit(",", 1)[1].rstrip(" )")) for span in tokens]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert [span["class"] for span in tokens] == ["t", "t moved", "t clipped"]
    assert "alpha 1.000" in tokens[1]["title"]


def test_tokens_are_text_never_markup():
    evil = '<script>alert(1)</script>" onmouseover="x'
    parsed = read(trace_page([{"id": evil, "trace": [token(evil, 0.5)]}], title=evil))
    assert "script" not in parsed.tags
    assert all("onmouseover" not in span for span in parsed.spans)
    assert evil in parsed.text


def test_offline_and_without_traces():
    page = trace_page([{"index": 0, "text": "no trace"}, {"index": 1, "trace": [token("x", 0.5)]}])
    assert "http" not in page
    assert "<h2>1</h2>" in page
    assert "<h2>0</h2>" not in page

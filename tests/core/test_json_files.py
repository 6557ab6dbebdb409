import pytest

from paperworks.core.errors import CorruptFile
from paperworks.core.json_files import read_json_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds a list"),
        (b"[" * 10**5, "not valid JSON"),
    ],
)
def test_what_is_no_object_is_refused_with_its_path(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"config\.json .*{message}"):
        read_json_object(path)


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json_object(tmp_path / "a.json") == {"a": [1, None]}

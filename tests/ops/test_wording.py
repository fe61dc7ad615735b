"""Numbers in sentences, and texts that a terminal may print."""

import unicodedata

from raydml.ops.wording import counted, printable


def test_numbers_have_their_noun():
    assert counted(1, "image") == "1 image"
    assert counted(2000, "class", "classes") == "2,000 classes"


def test_what_controls_a_terminal_is_printed_in_letters():
    assert printable("a\x1b[31mb\r\x07\x9b1mc\x7f") == r"a\x1b[31mb\x0d\x07\x9b1mc\x7f"
    kept = [chr(code) for code in range(0x3000) if printable(chr(code)) == chr(code)]
    assert [one for one in kept if unicodedata.category(one) == "Cc"] == ["\t", "\n"]
    assert len(kept) == 0x3000 - 65 + 2  # Unicode has 65 control characters
    assert printable("ä\udcff") == "ä\udcff"  # bytes of a file name that are not UTF-8

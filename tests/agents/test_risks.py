"""Each kind of finding, with code that has it and code that only looks like it."""

from textwrap import dedent

import pytest

from weft_agents.library.review.analysis import analyse
from weft_agents.library.review.risks import KINDS, SEVERITIES

POSITIVE = {
    "eval": ["eval(a)", "exec(open(p).read())", "x = [eval(s) for s in a]"],
    "shell": [
        "import subprocess\nsubprocess.run(a, shell=True)",
        "import subprocess as sp\nsp.check_output(f'ls {a}', shell=True)",
        "from subprocess import Popen as P\nP(a, shell=True)",
        "import os\nos.system(a)",
        "from os import popen\npopen('ls')",
    ],
    "unpickle": [
        "import pickle\npickle.loads(a)",
        "from pickle import load\nload(f)",
        "import marshal\nmarshal.load(f)",
        "import shelve\nshelve.open(p)",
    ],
    "yaml-load": [
        "import yaml\nyaml.load(a)",
        "import yaml\nyaml.load(a, Loader=yaml.Loader)",
        "import yaml\nyaml.load(a, yaml.FullLoader)",
        "import yaml\nyaml.unsafe_load(a)",
        "from yaml import load\nload(a)",
    ],
    "tls-off": [
        "import requests\nrequests.get(u, verify=False, timeout=1)",
        "session.post(u, verify=False)",
        "import httpx\nhttpx.Client(verify=False)",
        "import ssl\nssl._create_unverified_context()",
    ],
    "sql-text": [
        "db.execute(f'SELECT * FROM t WHERE a = {a}')",
        "db.execute('select * from t where a = %s' % a)",
        "db.execute('DELETE FROM t WHERE a = ' + a)",
        "db.execute('update t set a = {}'.format(a))",
        "db.executemany(f'insert into {t} values (?)', rows)",
    ],
    "secret": [
        "PASSWORD = 'hunter22'",
        "self.api_key = 'sk-12345678'",
        "db_password: str = 'hunter22'",
        "connect(user='u', password='hunter22')",
        "config = {'client_secret': 'a8f5f167f44f'}",
        "config['secret_key'] = 'a8f5f167f44f'",
        "def f(a, password='hunter22'): ...",
        "def f(*, passwd='hunter22'): ...",
    ],
    "bare-except": ["try: a\nexcept: pass"],
    "broad-except": [
        "try: a\nexcept Exception: pass",
        "try: a\nexcept BaseException as e:\n    log(e)",
        "try: a\nexcept (OSError, Exception): pass",
    ],
    "mutable-default": [
        "def f(a=[]): ...",
        "def f(*, a={}): ...",
        "async def f(a, b=set()): ...",
        "f = lambda a=[1]: a",
        "def f(a=[x for x in y]): ...",
    ],
    "no-timeout": [
        "import requests\nrequests.get(u)",
        "from requests import post\npost(u, json={})",
        "import requests\nrequests.get(u, timeout=None)",
        "import urllib.request\nurllib.request.urlopen(u)",
        "from urllib.request import urlopen\nurlopen(u, data)",
    ],
    "blocking": [
        "import time\nasync def f():\n    time.sleep(1)",
        "from time import sleep\nasync def f():\n    for i in a:\n        sleep(1)",
        "import subprocess\nasync def f():\n    subprocess.run(['ls'])",
        "import requests\nasync def f():\n    requests.get(u, timeout=1)",
    ],
    "temp-name": ["import tempfile\ntempfile.mktemp()"],
    "weak-hash": [
        "import hashlib\nhashlib.md5(a)",
        "from hashlib import sha1\nsha1(a, usedforsecurity=True)",
    ],
    "assert": ["assert a", "def f():\n    assert a, 'why'"],
    "star-import": ["from a import *", "from . import *"],
}
NEGATIVE = {
    "eval": [
        "import ast\nast.literal_eval(a)",
        "model.eval()",
        "eval('1 + 1')",
        "from safe import eval\neval(a)",
        "db.exec(a)",
    ],
    "shell": [
        "import subprocess\nsubprocess.run(['ls', a])",
        "import subprocess\nsubprocess.run(a, shell=False)",
        "plot(shell=True)",
        "system.os.system(a)",
    ],
    "unpickle": ["import json\njson.loads(a)", "pickle.loads(a)", "import pickle\npickle.dumps(a)"],
    "yaml-load": [
        "import yaml\nyaml.safe_load(a)",
        "import yaml\nyaml.load(a, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.load(a, yaml.CSafeLoader)",
        "from yaml import load, SafeLoader as S\nload(a, Loader=S)",
        "config.load(a)",
    ],
    "tls-off": ["import requests\nrequests.get(u, verify=True, timeout=1)", "jwt.decode(a, verify=False)"],
    "sql-text": [
        "db.execute('SELECT * FROM t WHERE a = ?', (a,))",
        "db.execute('SELECT a ' 'FROM t')",
        "db.execute(f'SELECT a FROM t')",
        "runner.execute(f'update of {a}')",
        "db.execute(query)",
    ],
    "secret": [
        "PASSWORD = os.environ['PASSWORD']",
        "PASSWORD = ''",
        "PASSWORD = 'short'",
        "PASSWORD = '<your password>'",
        "PASSWORD = 'changeme-please'",
        "PASSWORD_FIELD = 'hunter22'",
        "password = 'new-password'",
        "API_KEY = 'MY_API_KEY'",
        "password = 'Enter your password'",
        "token_count = 'hunter22'",
        "private_key = '/etc/keys/one.pem'",
        "password = f'{a}12345'",
    ],
    "bare-except": ["try: a\nexcept OSError: pass", "try: a\nexcept:\n    undo()\n    raise"],
    "broad-except": [
        "try: a\nexcept OSError: pass",
        "try: a\nexcept Exception as e:\n    raise Other from e",
        "try: a\nexcept Exception:\n    undo()\n    raise",
    ],
    "mutable-default": ["def f(a=(), b=None, c=0, d=frozenset()): ...", "def f(a: list = None): ..."],
    "no-timeout": [
        "import requests\nrequests.get(u, timeout=3)",
        "import requests\nrequests.get(u, **options)",
        "from urllib.request import urlopen\nurlopen(u, None, 3)",
        "import httpx\nhttpx.get(u)",
        "requests.get(u)",
    ],
    "blocking": [
        "import time\ndef f():\n    time.sleep(1)",
        "import asyncio\nasync def f():\n    await asyncio.sleep(1)",
        "import time\nasync def f():\n    def g():\n        time.sleep(1)\n    await to_thread(g)",
    ],
    "temp-name": ["import tempfile\ntempfile.mkdtemp()"],
    "weak-hash": [
        "import hashlib\nhashlib.sha256(a)",
        "import hashlib\nhashlib.md5(a, usedforsecurity=False)",
    ],
    "assert": ["if not a: raise ValueError", "unittest.assertTrue(a)"],
    "star-import": ["from a import b", "import a"],
}


def kinds_of(source: str, path: str = "pkg/module.py") -> list[str]:
    made = analyse(path, dedent(source).encode())
    assert made.problem == ""
    return [finding.kind for finding in made.findings]


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(kind, source) for kind, sources in table.items() for source in sources]


def test_every_kind_has_an_example_on_either_side() -> None:
    assert set(POSITIVE) == set(NEGATIVE) == set(KINDS)


def test_kinds_are_listed_from_the_most_severe() -> None:
    order = [SEVERITIES.index(kind.severity) for kind in KINDS.values()]
    assert order == sorted(order)


@pytest.mark.parametrize(("kind", "source"), pairs(POSITIVE))
def test_it_is_found(kind: str, source: str) -> None:
    assert kinds_of(source).count(kind) == 1


@pytest.mark.parametrize(("kind", "source"), pairs(NEGATIVE))
def test_what_only_looks_like_it_is_not_found(kind: str, source: str) -> None:
    assert kind not in kinds_of(source)


def test_asserts_and_passwords_are_normal_in_tests() -> None:
    source = "PASSWORD = 'hunter22'\nassert a\neval(a)\n"
    assert kinds_of(source, "tests/test_x.py") == ["eval"]


def test_a_finding_names_its_line_and_what_was_found() -> None:
    [finding] = analyse("m.py", b"import os\n\n\nos.system(f'rm {path}')\n").findings
    assert (finding.line, finding.detail) == (4, "os.system(f'rm {path}')")


def test_a_secret_is_named_and_never_shown() -> None:
    [finding] = analyse("m.py", b"password = 'hunter22'\n").findings
    assert finding.detail == "password = …"


def test_a_long_detail_is_cut() -> None:
    [finding] = analyse("m.py", b"eval(" + b"a + " * 100 + b"a)\n").findings
    assert len(finding.detail) < 60
    assert finding.detail.endswith("…)")


def test_findings_come_in_the_order_of_their_lines() -> None:
    made = analyse("m.py", b"def f(a=[]):\n    eval(a)\n    assert a\n\ndef g(b={}): ...\n")
    assert [finding.line for finding in made.findings] == [1, 2, 3, 5]

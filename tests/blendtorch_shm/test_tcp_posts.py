"""The way back of a channel over TCP, without sockets: what a trainer posts reaches the instance once, whatever fails."""

import random
from collections import deque

import numpy as np
import pytest

from blendtorch_shm.memory.layout import VERSION
from blendtorch_shm.message.wire import Encoder
from blendtorch_shm.stream.bell import private_bell
from blendtorch_shm.transport.tcp.inlet import Inlet
from blendtorch_shm.transport.tcp.protocol import (
    ANOTHER_TRAINER,
    LOST_S,
    MAX_POSTS,
    RECEIVED,
    REFUSAL,
    SEQUENCE,
    Bye,
    ConsumerSession,
    Deliver,
    Hello,
    Posts,
    ProducerSession,
    Reject,
    Tell,
    encode,
    new_post,
)

KEY, LAUNCH = 77, 0x01234567
A, B, C = b"route a", b"route b", b"route c"
ANNA, BERT = b"A" * 16, b"B" * 16


def instance() -> ProducerSession:
    return ProducerSession(KEY, LAUNCH, is_channel=True)


def hello(session: bytes, generation: int = 1) -> list[bytes]:
    return [encode(Hello(VERSION, session, generation, 10, 0, [], LAUNCH))]


def posted(number: int, posts: Posts | None = None) -> bytes:
    """A post as it is sent: its header and its payload say its number."""
    post, payload = new_post(f"header {number}".encode(), 3)
    payload[:] = number
    posts = Posts() if posts is None else posts
    posts.add(post)
    return posts.waiting()[-1].tobytes()


def opened(deliver: object) -> tuple[int, bytes, bytes]:
    assert isinstance(deliver, Deliver)
    return deliver.sequence, deliver.header, bytes(deliver.payload)


def test_a_post_arrives_as_it_was_sent_and_posts_are_numbered() -> None:
    session, posts = instance(), Posts()
    session.hear(A, hello(ANNA))
    for number in range(3):
        (action,) = session.hear(A, [posted(number, posts)])
        assert opened(action) == (number, f"header {number}".encode(), bytes([number] * 3))


def test_a_post_is_heard_after_a_greeting_alone() -> None:
    session = instance()
    assert session.hear(A, [posted(0)]) == []
    session.hear(A, hello(ANNA))
    assert session.hear(B, [posted(0)]) == []
    assert len(session.hear(A, [posted(0)])) == 1


@pytest.mark.parametrize("cut", [4, 15, 20])
def test_a_post_that_makes_no_sense_is_rejected(cut: int) -> None:
    session = instance()
    session.hear(A, hello(ANNA))
    (action,) = session.hear(A, [posted(0)[:cut]])
    assert isinstance(action, Reject)


def test_where_there_is_no_channel_a_post_is_noise() -> None:
    session = ProducerSession(KEY, LAUNCH)
    session.hear(A, hello(ANNA))
    (action,) = session.hear(A, [posted(0)])
    assert isinstance(action, Reject)


def test_what_was_received_is_told_to_whoever_posted_it_wherever_that_is_now() -> None:
    session = instance()
    session.hear(A, hello(ANNA))
    assert session.say_received(ANNA, 5) == [Tell(A, RECEIVED + SEQUENCE.pack(5))]
    session.hear(B, hello(ANNA, 2))
    assert session.say_received(ANNA, 5) == [Tell(B, RECEIVED + SEQUENCE.pack(5))]
    assert session.say_received(BERT, 5) == []


def test_a_second_trainer_is_refused_until_the_first_one_leaves() -> None:
    session = instance()
    session.hear(A, hello(ANNA))
    told, rejected = session.hear(B, hello(BERT))
    assert isinstance(told, Tell)
    assert told.remark.startswith(REFUSAL + ANOTHER_TRAINER.encode())
    assert isinstance(rejected, Reject)
    assert session.hear(B, [posted(0)]) == []
    session.hear(A, [encode(Bye())])
    assert session.hear(B, hello(BERT, 2)) == []
    assert [peer.session for peer in session.peers] == [BERT]


def test_a_second_trainer_takes_the_place_of_one_that_is_lost_and_that_one_may_not_come_back() -> None:
    session = instance()
    session.hear(A, hello(ANNA))
    session.unreachable(A, 0.0)
    assert session.hear(B, hello(BERT)) == []
    assert [peer.session for peer in session.peers] == [BERT]
    assert isinstance(session.hear(C, hello(ANNA, 2))[0], Tell)


def test_a_trainer_that_lost_its_connection_comes_back() -> None:
    session = instance()
    session.hear(A, hello(ANNA))
    session.unreachable(A, 0.0)
    session.time_passed(LOST_S / 2)
    session.hear(B, hello(ANNA, 2))
    assert opened(session.hear(B, [posted(0)])[0])[0] == 0


def test_a_remark_that_is_none_and_one_about_an_unknown_post_do_no_harm() -> None:
    trainer = ConsumerSession(ANNA, 10)
    trainer.connected()
    posted(0, trainer.posts)
    assert trainer.receive([RECEIVED + SEQUENCE.pack(7)], 0.0) is None
    assert isinstance(trainer.receive([RECEIVED + b"?"], 0.0), Reject)
    assert len(trainer.posts) == 1
    trainer.receive([RECEIVED + SEQUENCE.pack(0)], 0.0)
    assert len(trainer.posts) == 0


# -- a connection that fails at random --------------------------------------------------------------------------


class Line:
    """A trainer, and an instance behind a connection that breaks: what is on its way then is lost, in both directions."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.trainer = ConsumerSession(ANNA, MAX_POSTS, LAUNCH)
        self.instance, self.inlet = instance(), self.new_inlet()
        self.to_instance: deque[bytes] = deque()
        self.to_trainer: deque[bytes] = deque()
        self.routes = 0
        self.sent = 0
        self.taken: list[int] = []
        self.connect()

    @staticmethod
    def new_inlet() -> Inlet:
        return Inlet(private_bell(), "here", trusted=False)

    def connect(self) -> None:
        self.to_instance.clear()
        self.to_trainer.clear()
        if self.routes:
            self.instance.unreachable(self.route, 0.0)
            self.trainer.disconnected()
        self.routes += 1
        self.route = f"route {self.routes}".encode()
        self.greet(self.trainer.connected())

    def greet(self, said: Hello) -> None:
        self.to_instance.append(encode(said))
        self.to_instance += [post.tobytes() for post in self.trainer.posts.waiting()]

    def interrupt(self) -> None:
        """A call of the trainer was cut short."""
        self.greet(self.trainer.resume())

    def die(self) -> None:
        """The instance is killed, and another one takes its place."""
        while self.to_instance:  # else what the trainer cannot know to be taken would be taken twice
            self.instance_hears()
        self.say_received()
        while self.to_trainer:
            self.trainer_hears()
        self.instance, self.inlet = instance(), self.new_inlet()
        self.connect()

    def post(self) -> None:
        if len(self.trainer.posts) < MAX_POSTS:
            self.to_instance.append(posted(self.sent, self.trainer.posts))
            self.sent += 1

    def instance_hears(self) -> None:
        if self.to_instance:
            for action in self.instance.hear(self.route, [self.to_instance.popleft()]):
                assert isinstance(action, Deliver)
                if not self.inlet.put(action):
                    self.tell(action.session, action.sequence)

    def take(self) -> None:
        if self.inlet._arrived:
            post = self.inlet._arrived[0]
            self.inlet._accept(post)
            self.taken.append(int(post.header.split()[1]))

    def say_received(self) -> None:
        while (received := self.inlet.next_received()) is not None:
            self.tell(*received)

    def tell(self, session: bytes, sequence: int) -> None:
        for told in self.instance.say_received(session, sequence):
            assert isinstance(told, Tell)
            if told.route == self.route:
                self.to_trainer.append(told.remark)

    def trainer_hears(self) -> None:
        if self.to_trainer:
            assert self.trainer.receive([self.to_trainer.popleft()], 0.0) is None


@pytest.mark.parametrize("seed", range(40))
def test_each_post_is_taken_once_and_in_order_whatever_breaks(seed: int) -> None:
    line = Line(seed)
    usual = [line.post, line.instance_hears, line.instance_hears, line.take, line.say_received, line.trainer_hears]
    for _ in range(400):
        line.random.choice([*usual * 4, line.connect, line.interrupt, line.die])()
    for _ in range(200):
        for step in usual[1:]:
            step()
    assert line.taken == list(range(line.sent))
    assert line.sent > 20
    assert len(line.trainer.posts) == 0


def test_a_script_sees_posts_with_their_arrays_as_its_own() -> None:
    """They are writable, and nobody else's."""
    parts = Encoder(trusted=False).take_apart({"image": np.arange(9000), "i": 3})
    post, payload = new_post(parts.header(), parts.nbytes)
    parts.copy_into(payload)
    session = instance()
    session.hear(A, hello(ANNA))
    (deliver,) = session.hear(A, [post.tobytes()])
    assert isinstance(deliver, Deliver)
    inlet = Line.new_inlet()
    assert inlet.put(deliver)
    message = inlet.take()
    assert message is not None
    np.testing.assert_array_equal(message.fields["image"], np.arange(9000))
    assert message.fields["image"].flags.writeable
    assert inlet.put(deliver)  # posted again: nothing to tell until it is told that it was received
    assert inlet.take() is None
    assert inlet.next_received() == (ANNA, 0)
    assert not inlet.put(deliver)

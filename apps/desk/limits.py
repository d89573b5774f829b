"""How much visitors of the desk may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeskLimits:
    """Bounds of the desk. What all have together is shared out over tenants: where one has taken
    it all, another still gets its share.

    Attributes:
        visitors: sessions at once; above, those idle for longest of the tenant with most end.
        idle_s: seconds without a request after which a session ends.
        lifetime_s: seconds after which it ends in any case.
        pages: open pages of one session.
        questions: questions of one session that are answered at once.
        streams: open event streams of one session.
        all_streams: of all together.
        upload_bytes: largest picture or clip.
        visitor_bytes: pictures and clips of one session; its oldest make room.
        all_bytes: of all together; the oldest of who holds most make room, of the tenant whose
            visitors hold most.
        upload_s: seconds that a picture or clip is kept.
        own_uploading: uploads of one session at once.
        uploading: of all together.
        logins: attempts to log in per minute and address.
        all_logins: of all addresses together.
    """

    visitors: int = 512
    idle_s: float = 3600.0
    lifetime_s: float = 12 * 3600.0
    pages: int = 8
    questions: int = 4
    streams: int = 16
    all_streams: int = 256
    upload_bytes: int = 20 << 20
    visitor_bytes: int = 64 << 20
    all_bytes: int = 256 << 20
    upload_s: float = 3600.0
    own_uploading: int = 2
    uploading: int = 32
    logins: int = 10
    all_logins: int = 100

"""All commands: their names, what they do in one line, and where they are.

Imports nothing of them: a command is imported when it is used.
"""

from decant.storage.cli.commands import Entry, Table

TEACHER = (
    Entry(
        "dump",
        "Score a text source with a teacher, once, into a cache.",
        "decant.teacher_dump.job.command:DUMP",
    ),
    Entry(
        "plan",
        "Score a sample; predict hours, bytes, and what each k keeps.",
        "decant.teacher_dump.planning.command:PLAN",
    ),
    Entry(
        "messages",
        "Write the conversations of a dump's source, by sample id.",
        "decant.teacher_dump.job.command:MESSAGES",
    ),
    Entry(
        "audit",
        "Does a cache say what its teacher says? Score a sample again.",
        "decant.teacher_dump.audit.command:AUDIT",
    ),
    Entry(
        "rescore",
        "Score the sequences of a cache again: another k, another teacher.",
        "decant.teacher_dump.rescore.command:RESCORE",
    ),
    Entry(
        "add-temperature",
        "Score the sequences of a cache again at more temperatures.",
        "decant.teacher_dump.rescore.command:ADD_TEMPERATURE",
    ),
    Entry(
        "serve",
        "Offer a teacher to dumps on other machines.",
        "decant.teacher_dump.service.command:SERVE",
    ),
)
CACHE = (
    Entry(
        "inspect",
        "What a cache holds and how good it is.",
        "decant.storage.inspect.command:INSPECT",
    ),
    Entry(
        "head",
        "Targets in context, with the teacher's entries.",
        "decant.storage.inspect.command:HEAD",
    ),
    Entry(
        "diff",
        "How far apart two caches of the same sequences are.",
        "decant.storage.inspect.command:DIFF",
    ),
    Entry(
        "verify",
        "Is a cache whole? Every byte is hashed, every value checked.",
        "decant.storage.cache.command:VERIFY",
    ),
    Entry(
        "align",
        "What a student of another tokenizer could learn from a cache.",
        "decant.student_train.alignment.command:ALIGN",
    ),
    Entry(
        "export",
        "Write a cache as plain lists that other tools read.",
        "decant.storage.exchange.command:EXPORT",
    ),
    Entry(
        "import",
        "Make a cache from a top-k dump of another tool.",
        "decant.storage.exchange.command:IMPORT",
    ),
    Entry(
        "push",
        "Put a cache on the Hugging Face hub, with a dataset card.",
        "decant.storage.hub.command:PUSH",
    ),
    Entry(
        "pull",
        "Copy a cache from the Hugging Face hub, and verify it.",
        "decant.storage.hub.command:PULL",
    ),
    Entry(
        "migrate",
        "Make an older cache again in the present version of the format.",
        "decant.storage.edit.command:MIGRATE",
    ),
)
EDIT = (
    Entry(
        "subset",
        "Some sequences of a cache, by id, condition or share, as a cache.",
        "decant.storage.edit.command:SUBSET",
    ),
    Entry(
        "merge",
        "Several caches of one teacher as one.",
        "decant.storage.edit.command:MERGE",
    ),
    Entry(
        "dedupe",
        "A cache without the sequences that repeat another's tokens.",
        "decant.storage.edit.command:DEDUPE",
    ),
)
STUDENT = (
    Entry(
        "train",
        "Train a student from a cache. No teacher is loaded.",
        "decant.student_train.command:TRAIN",
    ),
    Entry(
        "rounds",
        "Sample with the student, score, train, again: on-policy by rounds.",
        "decant.student_train.rounds.command:ROUNDS",
    ),
    Entry(
        "evaluate",
        "How good is a student on a cache it was not trained on?",
        "decant.student_train.command:EVALUATE",
    ),
)
START = (
    Entry(
        "examples",
        "Copy example configurations and a demo into a folder.",
        "decant.copy_examples:EXAMPLES",
    ),
)
ALL: Table = (
    ("score a teacher", TEACHER),
    ("look at a cache", CACHE),
    ("make a cache of others", EDIT),
    ("train a student", STUDENT),
    ("begin", START),
)

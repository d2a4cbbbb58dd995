"""Flower's door into the lender: a ClientApp whose handlers pass bytes to `Lender.answer`.

The node runs this installed app and no other; a bundle from the coordinator is never fetched.
"""

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedfin.client.lender import Lender
from fedfin.wire import MESSAGE_TYPES, from_record, to_record

__all__ = ["make_app"]


def make_app(lender: Lender) -> ClientApp:
    """Return the ClientApp that answers in the name of `lender`."""
    app = ClientApp()

    def handle(message: FlowerMessage, context: Context) -> FlowerMessage:
        del context  # nothing of Flower's run configuration is read: the plan travels in our message
        return FlowerMessage(to_record(lender.answer(from_record(message.content))), reply_to=message)

    for message_type in sorted(set(MESSAGE_TYPES.values())):
        category, _, action = message_type.partition(".")
        register = {"train": app.train, "query": app.query, "evaluate": app.evaluate}[category]
        register(action)(handle)
    return app

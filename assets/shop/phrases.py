"""The words of the customer-service requests: names, rules, questions and their wordings."""

from __future__ import annotations

STORES = (
    "Northwind",
    "Bluebird",
    "Harbor",
    "Maple",
    "Sunrise",
    "Quartz",
    "Pioneer",
    "Lakeside",
    "Cobalt",
    "Ember",
)
NAMES = (
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
    "Tara",
    "Viktor",
)
CITIES = (
    "Oslo",
    "Paris",
    "Milan",
    "Porto",
    "Vienna",
    "Dublin",
    "Prague",
    "Lyon",
    "Turin",
    "Bergen",
)
FILLERS = (
    "Answer politely and in one short sentence.",
    "We answer every letter within one working day.",
    "Look at the photo before you answer.",
    "Customers may send a photo of the box as well.",
    "Promise nothing that is not written here.",
    "Stay calm when a customer is angry.",
    "Payments by card are handled by our bank.",
    "Close the box well before you send it.",
    "Small marks from normal use are no reason for a refund.",
    "Our shops are closed on Sunday.",
    "Gift cards can be used in every shop.",
    "Keep the data of one customer from another.",
    "Parts for older products can be ordered.",
    "These terms are for orders from this year.",
    "Every parcel is insured against loss.",
    "A receipt is needed for each claim.",
    "We repair products in our own workshop.",
    "Good light makes photos easier to read.",
    "Our newsletter comes once a month.",
    "Ask for help if you are not sure.",
    "Large orders are packed by two people.",
    "The shop was founded by two sisters.",
    "Thank the customer for writing to us.",
    "Batteries are never part of a parcel.",
)
NUMBERS = ("no", "one", "two", "three", "four")

PICTURE_TOPICS = ("kind", "colour", "buttons", "crack", "code")
TEXT_TOPICS = ("order", "name", "warranty", "days", "city")
BOTH_TOPICS = ("my_warranty", "my_fee")  # need the photo and the policy
POLICY_TOPICS = ("warranty", "days", "city", *BOTH_TOPICS)
TOPICS = PICTURE_TOPICS + TEXT_TOPICS + BOTH_TOPICS

HEADS = (
    "You are the assistant of the {store} store.",
    "You work for {store} and help its customers.",
    "You answer the customers of {store}.",
    "This is the service desk of {store}.",
)
DAYS = (
    "Products can be returned within {days} days.",
    "Customers may return a product for {days} days after delivery.",
    "The return period is {days} days.",
)
FEES = (
    "Sending back a cracked product costs {cracked} euro, an intact product {intact} euro.",
    "The return fee is {cracked} euro for cracked products and {intact} euro for intact products.",
)
CITY = (
    "Our warehouse is in {city}.",
    "All parcels go to the warehouse in {city}.",
)
WARRANTY_STYLES = 3
INTROS = (
    "Hello, my name is {name} and my order number is {order}.",
    "Hi, I am {name}. Order number {order}.",
    "My order number is {order}. My name is {name}.",
    "This is {name}, my order number is {order}.",
)
# {it} becomes "the product in the second photo" when there are two photos.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "kind": (
        "What is shown {here}?",
        "Which product do you see {here}?",
        "What kind of product is {here}?",
        "Tell me what is {here}.",
    ),
    "colour": (
        "What colour is {it}?",
        "Which colour does {it} have?",
        "Tell me the colour of {it}.",
        "In which colour is {it}?",
    ),
    "buttons": (
        "How many buttons does {it} have?",
        "Count the buttons of {it}.",
        "How many buttons are on {it}?",
        "Tell me the number of buttons of {it}.",
    ),
    "crack": (
        "Is {it} damaged?",
        "Is {it} cracked?",
        "Do you see a crack on {it}?",
        "Is there any damage to {it}?",
    ),
    "code": (
        "Which code is on the label {here}?",
        "What number is printed on the label {here}?",
        "Read the label {here}.",
        "Tell me the code on the label {here}.",
    ),
    "order": (
        "What is my order number?",
        "Please repeat my order number.",
        "Which order number did I give you?",
        "Tell me my order number.",
    ),
    "name": (
        "What is my name?",
        "Do you know my name?",
        "Who am I?",
        "Tell me my name.",
    ),
    "warranty": (
        "How long is the warranty for a {kind}?",
        "What warranty does a {kind} have?",
        "For how many months is a {kind} covered?",
        "Tell me the warranty of a {kind}.",
    ),
    "days": (
        "How many days do I have for a return?",
        "How long can I return a product?",
        "Until when can I send something back?",
        "Tell me the return period.",
    ),
    "city": (
        "Where is your warehouse?",
        "Where do I send the parcel?",
        "In which city is your warehouse?",
        "Tell me where parcels go.",
    ),
    "my_warranty": (
        "How long is the warranty for {it}?",
        "What warranty does {it} have?",
        "For how many months is {it} covered?",
        "Tell me the warranty of {it}.",
    ),
    "my_fee": (
        "What does it cost to send {it} back?",
        "How much is the return of {it}?",
        "What do I pay to return {it}?",
        "Tell me the return fee for {it}.",
    ),
}
PHRASINGS = 4

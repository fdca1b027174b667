"""Word lists of the generators: names that a tokenizer knows and that filler text rarely has."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = _words(
    "Lisbon Oslo Cairo Lima Quito Hanoi Dublin Ankara Havana Vienna Geneva Boston Madras Kyoto "
    "Bergen Tunis Naples Seville Utrecht Malmo Dakar Nairobi Perth Denver Austin Bremen Cusco "
    "Delhi Essex Fargo Ghent Izmir Jaffa Kazan Leeds Milan Nantes Odessa Padua Riga Siena Turin "
    "Ulm Verona Warsaw Xian York Zurich Aachen Basel Cadiz Derby Exeter Faro Graz Hull Ipswich "
    "Jena Kiel Lyon Metz Nice Olbia Porto Rouen Split"
)
KEEPERS = _words(
    "Agnes Bruno Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karla Leon Mona Nils Olga Pavel "
    "Quinn Rosa Stefan Tilda Ursula Viktor Wanda Xavier Yara Zoltan Amina Boris Celia Dario Edith "
    "Frank Gwen"
)
ADJECTIVES = _words(
    "amber brisk calm dusty eager frozen gentle hollow ivory jolly keen lively mellow narrow olive "
    "polite quiet rustic silent tidy upper vivid windy young"
)
NOUNS = _words(
    "anchor bridge candle drum engine fence garden hammer island jacket kettle ladder mirror "
    "needle orchard pillow quarry ribbon saddle tunnel umbrella violin wagon zipper"
)

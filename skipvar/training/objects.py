"""The objects that the embedded model can draw: well-known, visually distinct emoji, by the names that people type."""

# One object a line: short name in emoji.json, then the names for it, first the usual one; `name/plural` if not regular.
_TABLE = """
panda_face: panda
koala: koala
tiger: tiger
lion_face: lion
cow: cow
pig: pig
frog: frog
fox_face: fox/foxes
rabbit: rabbit, bunny/bunnies
cat: cat
dog: dog
mouse: mouse/mice
unicorn_face: unicorn
elephant: elephant
penguin: penguin
owl: owl
hatched_chick: chick
flamingo: flamingo
parrot: parrot
bee: bee
butterfly: butterfly/butterflies
ladybug: ladybug, ladybird
snail: snail
octopus: octopus/octopuses
crab: crab
lobster: lobster
tropical_fish: tropical fish/tropical fish, fish/fish
whale: whale
dolphin: dolphin
shark: shark
turtle: turtle
snake: snake
crocodile: crocodile
sauropod: dinosaur
giraffe_face: giraffe
bat: bat
hedgehog: hedgehog
cactus: cactus/cacti
palm_tree: palm tree
deciduous_tree: tree
christmas_tree: christmas tree
tulip: tulip
rose: rose
sunflower: sunflower
mushroom: mushroom
maple_leaf: maple leaf/maple leaves
four_leaf_clover: clover, four leaf clover
apple: apple, red apple
green_apple: green apple
pear: pear
tangerine: orange, tangerine
lemon: lemon
banana: banana
watermelon: watermelon
grapes: grapes/grapes
strawberry: strawberry/strawberries
cherries: cherries/cherries
peach: peach/peaches
pineapple: pineapple
kiwifruit: kiwi
tomato: tomato/tomatoes
eggplant: eggplant, aubergine
avocado: avocado
broccoli: broccoli/broccoli
carrot: carrot
corn: corn/corn cobs
hot_pepper: chili pepper, chili
croissant: croissant
pretzel: pretzel
cheese_wedge: cheese/cheeses
fried_egg: fried egg
hamburger: hamburger, burger
fries: french fries/french fries, fries/fries
pizza: pizza
hotdog: hot dog
taco: taco
icecream: ice cream
doughnut: donut, doughnut
cookie: cookie
cake: cake
cupcake: cupcake
lollipop: lollipop
honey_pot: honey/honey pots, honey pot
glass_of_milk: glass of milk/glasses of milk
coffee: coffee/cups of coffee, cup of coffee/cups of coffee
wine_glass: wine/glasses of wine, glass of wine/glasses of wine
cocktail: cocktail
beer: beer
popcorn: popcorn/popcorn
soccer: soccer ball
basketball: basketball
football: football
tennis: tennis racket
volleyball: volleyball
8ball: billiard ball, eight ball
trophy: trophy/trophies
sports_medal: medal
dart: target, dartboard
game_die: dice/dice
balloon: balloon
gift: gift, present
jack_o_lantern: pumpkin, jack o lantern
teddy_bear: teddy bear
kite: kite
art: palette, paint palette
boxing_glove: boxing glove
jigsaw: puzzle piece
car: car, red car
taxi: taxi
bus: bus/buses
ambulance: ambulance
fire_engine: fire truck, fire engine
tractor: tractor
bike: bicycle, bike
steam_locomotive: train, locomotive
airplane: airplane, plane
helicopter: helicopter
rocket: rocket
boat: sailboat, boat
flying_saucer: ufo, flying saucer
house: house
european_castle: castle
vertical_traffic_light: traffic light
anchor: anchor
volcano: volcano/volcanoes
rainbow: rainbow
sunny: sun
crescent_moon: moon, crescent moon
star: star
cloud: cloud
snowman_without_snow: snowman/snowmen
snowflake: snowflake
zap: lightning bolt
fire: fire, flame
droplet: water drop, drop
earth_americas: earth, globe
ringed_planet: planet, saturn
umbrella: umbrella
hourglass_flowing_sand: hourglass/hourglasses
alarm_clock: alarm clock, clock
heart: heart, red heart
ghost: ghost
robot_face: robot
skull: skull
key: key
lock: lock, padlock
bell: bell
guitar: guitar
trumpet: trumpet
violin: violin
drum_with_drumsticks: drum
microphone: microphone
headphones: headphones/headphones
camera: camera
tv: tv, television
bulb: light bulb, lightbulb
candle: candle
bomb: bomb
magnet: magnet
hammer: hammer
scissors: scissors/scissors
pencil2: pencil
closed_book: book
email: envelope, letter
gem: diamond, gem
crown: crown
ring: ring
tophat: top hat, hat
dark_sunglasses: sunglasses/sunglasses
shirt: shirt
dress: dress/dresses
athletic_shoe: shoe, sneaker
school_satchel: backpack
chair: chair
bathtub: bathtub
shield: shield
axe: axe
moneybag: money bag
"""


def _names(listing: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for name in listing.split(","):
        singular, _, plural = name.strip().partition("/")
        pairs.append((singular, plural or singular + "s"))
    return tuple(pairs)


OBJECTS: dict[str, tuple[tuple[str, str], ...]] = {
    short_name: _names(listing)
    for short_name, _, listing in (line.partition(": ") for line in _TABLE.strip().splitlines())
}
"""Short name in emoji.json to the (singular, plural) names of the object; order fixes the object's index."""
